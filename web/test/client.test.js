// AIGatewayClient.js against a real relay with scripted providers behind it, at RELAY_URL.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { gzipSync } from "node:zlib";
import { describe, expect, test } from "vitest";
import { WebSocket as NodeSocket } from "ws";
import {
  AIGatewayError, aiGateway, createAIGateway, createAIGatewayClient, createCartesiaClient, createElevenLabsClient, createFalClient,
  createGeminiLiveClient, createOpenAIRealtimeClient,
} from "../AIGatewayClient.js";

/** A session with the scripted provider: it echoes, and does what `{do: …}` says. */
const scripted = (options = {}) => createAIGatewayClient({ provider: "scripted", reconnect: { baseMs: 1, capMs: 5 }, ...options });
const next = (target, type) => new Promise((resolve) => target.addEventListener(type, resolve, { once: true }));
const until = async (client, wanted) => {
  for await (const message of client) if (wanted(message)) return message;
};

test("it stays under 6 KiB gzipped, as it ships", () => {
  expect(gzipSync(readFileSync(new URL("../AIGatewayClient.js", import.meta.url)), { level: 9 }).length).toBeLessThan(6 * 1024);
});

describe("sessions", () => {
  test("OpenAI Realtime needs no option, and outdated fields become today's", async () => {
    const messages = [];
    const client = createOpenAIRealtimeClient({ onMessage: (message) => messages.push(message), onError: (error) => messages.push(error) });
    await client.connect();
    const asked = { type: "response.create", response: { modalities: ["text"], instructions: "Say hello." } };
    client.send({ type: "session.update", session: { modalities: ["text", "audio"] } });
    client.send(asked);
    const done = await until(client, (message) => message.type === "response.done");
    client.disconnect();
    expect(done.response.usage.total_tokens).toBe(253);
    expect(messages[0].session.model).toBe("gpt-realtime-2.1");
    expect(asked.response.modalities).toEqual(["text"]);
    expect(client.state).toMatch(/open|closed/);
    const seen = await (await aiGateway.request({ provider: "seen", endpoint: "openai" })).json();
    expect(seen.messages).toEqual([
      { type: "session.update", session: { type: "realtime", output_modalities: ["audio"] } },
      { type: "response.create", response: { output_modalities: ["text"], instructions: "Say hello." } },
    ]);
  });

  test("Gemini Live's JSON in binary frames arrives as objects", async () => {
    const client = createGeminiLiveClient();
    await client.connect();
    client.send({ setup: { model: "models/gemini-live" } });
    expect(await until(client, (message) => message.setupComplete)).toEqual({ setupComplete: {} });
    client.disconnect();
  });

  test("Cartesia, ElevenLabs and fal open their own endpoints", async () => {
    for (const [client, sent, wanted] of [
      [createCartesiaClient(), { context_id: "c1", transcript: "hello" }, (message) => message.type === "done"],
      [createElevenLabsClient({ voiceId: "voice 1", model: "m" }), { text: "hello " }, (message) => message.audio],
      [createElevenLabsClient({ agentId: "agent" }), { type: "user_message" }, (message) => message.type === "agent_response"],
      [createFalClient({ app: "fal-ai/fast" }), { prompt: "a cat" }, (message) => message.prompt === "a cat"],
    ]) {
      await client.connect();
      client.send(sent);
      expect(await until(client, wanted)).toBeTruthy();
      client.disconnect();
    }
  });

  test("an option that is undefined is left out", async () => {
    const none = undefined;
    const unset = {
      provider: none, endpoint: none, query: none, model: none, protocols: none, token: none,
      reconnect: none, maxBufferedBytes: none, connectTimeoutMs: none, outgoing: none, signal: none,
    };
    for (const [client, sent, wanted] of [
      [createElevenLabsClient({ voiceId: "v", agentId: none, ...unset }), { text: "hello " }, (message) => message.audio],
      [createOpenAIRealtimeClient(unset), { type: "response.create", response: { modalities: ["text"] } }, (message) => message.type === "response.done"],
    ]) {
      await client.connect();
      client.send(sent);
      expect(await until(client, wanted)).toBeTruthy();
      client.disconnect();
    }
  });

  test("an empty model, agent or voice, as from an empty text field, is left out", async () => {
    for (const client of [
      scripted({ model: "" }),
      createElevenLabsClient({ provider: "scripted", protocols: [], agentId: "", voiceId: "", model: "m" }),
    ]) {
      await client.connect();
      client.send({ do: "query" });
      expect(await until(client, () => true)).toEqual({ query: "" });
      client.disconnect();
    }
  });

  test("text, JSON and bytes pass as they are", async () => {
    const client = scripted();
    await client.connect();
    client.send({ a: 1 });
    client.send("plain");
    client.send(new Uint8Array([0, 255]));
    client.send(new Blob(["blob"]));
    const got = [];
    for await (const message of client) if (got.push(message) === 4) break;
    expect(got.slice(0, 2)).toEqual([{ a: 1 }, "plain"]);
    expect([...new Uint8Array(got[2])]).toEqual([0, 255]);
    expect(new TextDecoder().decode(got[3])).toBe("blob");
    client.disconnect();
  });

  test("a token goes as a subprotocol, a fresh ticket takes its place for every connection", async () => {
    const tickets = [];
    const client = scripted({ token: "unused", getTicket: async () => `ticket-${tickets.push(1)}` });
    await client.connect();
    const restored = next(client, "reconnected");
    client.send({ do: "drop" });
    await restored;
    expect(tickets.length).toBe(2);
    client.disconnect();
  });

  test("options, events, callbacks and states", async () => {
    const told = [];
    const note = (name) => (event) => told.push([name, event?.code]);
    const client = scripted({ onOpen: note("onOpen"), onClose: note("onClose"), query: { a: "b c" } });
    for (const type of ["open", "close"]) client.addEventListener(type, note(type));
    expect(client.state).toBe("closed");
    const opening = client.connect();
    expect(client.state).toBe("connecting");
    await opening;
    await expect(client.connect()).rejects.toMatchObject({ code: "already_connected" });
    client.send({ do: "query" });
    expect((await until(client, (message) => message.query)).query).toBe("a=b c");
    const closed = next(client, "close");
    client.disconnect(4001, "enough");
    await closed;
    expect(told.map(([name]) => name)).toEqual(["open", "onOpen", "close", "onClose"]);
    expect(client.state).toBe("closed");
  });
});

describe("connections that break", () => {
  test("a session is restored after a loss, and what was sent meanwhile arrives, in order", async () => {
    const events = [];
    const client = scripted({ onReconnecting: ({ error }) => events.push(error.code), onReconnected: () => events.push("reconnected") });
    await client.connect();
    const broken = next(client, "reconnecting");
    client.send({ do: "drop" });
    await broken;
    for (let n = 0; n < 5; n++) client.send({ n });
    expect(client.bufferedAmount).toBeGreaterThan(0);
    const got = [];
    for await (const message of client) if (got.push(message.n) === 5) break;
    expect(got).toEqual([0, 1, 2, 3, 4]);
    expect(events).toEqual(["upstream_failed", "reconnected"]);
    client.disconnect();
  });

  test.each([[1012, "restarting"], [1013, "try_later"]])("after %i it comes back", async (code, name) => {
    const client = scripted();
    await client.connect();
    const told = next(client, "reconnecting");
    const restored = next(client, "reconnected");
    client.send({ do: "close", code, reason: "soon" });
    expect((await told).error).toMatchObject({ code: name, status: code, message: "soon", source: "relay" });
    await restored;
    client.disconnect();
  });

  test.each([[1008, "refused"], [1009, "message_too_large"], [4402, "budget_exhausted"], [4408, "idle_timeout"], [4123, "session_closed"]])(
    "%i is final: a typed error with its reason", async (code, name) => {
      const client = scripted();
      await client.connect();
      const errors = [];
      client.addEventListener("error", ({ error }) => errors.push(error));
      const iterating = (async () => { for await (const _ of client); })();
      client.send({ do: "close", code, reason: "because" });
      await expect(iterating).rejects.toMatchObject({ name: "AIGatewayError", code: name, status: code, message: "because" });
      expect(errors).toHaveLength(1);
      expect(client.state).toBe("closed");
    });

  test("a normal close ends iteration without an error", async () => {
    const client = scripted();
    await client.connect();
    client.send({ do: "close", code: 1000, reason: "done" });
    for await (const _ of client);
    expect(client.state).toBe("closed");
  });

  test("what could not be sent in the end is handed back", async () => {
    let asked = 0;
    const errors = [];
    const client = scripted({ getTicket: () => { if (asked++) throw new Error("signed out"); return "t"; }, onError: (error) => errors.push(error) });
    await client.connect();
    const broken = next(client, "reconnecting");
    client.send({ do: "drop" });
    await broken;
    const lost = client.send({ precious: true });
    client.send("too");
    await expect(lost).rejects.toMatchObject({ message: "signed out", unsent: ['{"precious":true}', "too"] });
    await expect(lost).rejects.toBeInstanceOf(AIGatewayError);
    expect(errors.at(-1).cause.message).toBe("signed out");
    expect(errors.at(-1).unsent).toEqual(['{"precious":true}', "too"]);
    await expect(client.send("later")).rejects.toMatchObject({ code: "not_connected", unsent: ["later"] });
  });

  test("attempts are bounded", async () => {
    const waits = [];
    const client = scripted({ reconnect: { attempts: 3, baseMs: 1, capMs: 2 }, onReconnecting: ({ delayMs }) => waits.push(delayMs) });
    await client.connect();
    const over = next(client, "error");
    client.send({ do: "drop always" });
    await over;
    expect(waits).toHaveLength(3);
    expect(Math.max(...waits)).toBeLessThanOrEqual(2);
    await aiGateway.request({ provider: "seen", endpoint: "reset" });
  });

  test("a handshake that ends with an error alone, as in Node 22, fails at once", async () => {
    class OnlyError {
      constructor() { setTimeout(() => this.onerror(new Event("error"))); }
      close() {}
    }
    const refused = await scripted({ WebSocket: OnlyError, connectTimeoutMs: 60_000 }).connect().catch((error) => error);
    expect(refused.code).toBe("connect_failed");
  });

  test("reconnect: false leaves it closed", async () => {
    const client = scripted({ reconnect: false });
    await client.connect();
    const failed = next(client, "error");
    client.send({ do: "drop" });
    expect((await failed).error.code).toBe("upstream_failed");
    expect(client.state).toBe("closed");
  });

  test("a slow provider is felt: send holds back, nothing is lost, order is kept", async () => {
    const client = scripted({ maxBufferedBytes: 128 * 1024 });
    await client.connect();
    client.send({ do: "sleep", ms: 400 });
    const body = "x".repeat(256 * 1024); // more in all than the buffers of two TCP connections hold
    let held = 0;
    const sent = [];
    for (let n = 0; n < 200; n++) sent.push(client.send({ n, body }));
    held = client.bufferedAmount;
    expect(held).toBeGreaterThan(1024 * 1024);
    const got = [];
    for await (const message of client) if (got.push(message.n) === 200) break;
    await Promise.all(sent);
    expect(got).toEqual(Array.from({ length: 200 }, (_, n) => n));
    client.disconnect();
  });

  test("an AbortSignal ends it for good", async () => {
    const controller = new AbortController();
    const client = scripted({ signal: controller.signal });
    await client.connect();
    const closed = next(client, "close");
    controller.abort();
    await closed;
    expect(client.state).toBe("closed");
    await expect(client.connect()).rejects.toMatchObject({ code: "aborted" });
  });

  test("disconnect while it connects: connect says so", async () => {
    const client = scripted();
    const opening = client.connect();
    client.disconnect();
    await expect(opening).rejects.toMatchObject({ code: "aborted" });
  });
});

describe("handshakes that are refused say why", () => {
  test.each([
    [{ provider: "nobody" }, "unknown_provider", /no provider named 'nobody'/],
    [{ provider: "unset" }, "provider_not_configured", /NOT_SET_KEY/],
    [{ provider: "rest-only" }, "websocket_not_supported", /takes no WebSockets/],
    [{ provider: "scripted", endpoint: "refuses" }, "connect_failed", /provider did not open/],
    [{ provider: "scripted", url: "http://127.0.0.1:9" }, "connect_failed", /cannot be reached/],
  ])("%o", async (options, code, message) => {
    const errors = [];
    const client = createAIGatewayClient({ ...options, onError: (error) => errors.push(error) });
    await expect(client.connect()).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
    expect(errors).toHaveLength(1);
    expect(client.state).toBe("closed");
  });
});

describe("tickets", () => {
  /** A browser's WebSocket sends the page's origin; Node's does not. */
  class PageSocket extends NodeSocket {
    constructor(url, protocols) { super(url, protocols, { origin: "https://app.example" }); used.push({ url, protocols }); }
  }
  const used = [];
  const backend = `${process.env.BACKEND_URL}/ticket`;
  const ask = async (provider) => (await fetch(`${backend}?provider=${provider}`, { method: "POST" })).json();
  const inPage = (options) => { used.length = 0; return scripted({ WebSocket: PageSocket, ...options }); };

  test("the URL of a backend gives a new one for each connection", async () => {
    const client = inPage({ getTicket: `${backend}?provider=scripted` });
    await client.connect();
    const restored = next(client, "reconnected");
    client.send({ do: "drop" });
    await restored;
    client.send({ n: 1 });
    expect(await until(client, (message) => message.n === 1)).toEqual({ n: 1 });
    const tickets = used.map(({ protocols }) => protocols[0]);
    expect(tickets.map((ticket) => /^cf-aig-authorization\.rt_.{32}$/.test(ticket))).toEqual([true, true]);
    expect(tickets[0]).not.toBe(tickets[1]);
    client.disconnect();
  });

  test("a function may return the ticket, or the whole answer, whose URL and subprotocols are used", async () => {
    for (const getTicket of [async () => (await ask("scripted")).ticket, () => ask("scripted")]) {
      const client = inPage({ getTicket, query: { a: "b" } });
      await client.connect();
      client.send({ do: "query" });
      expect(await until(client, (message) => message.query)).toEqual({ query: "a=b" });
      client.disconnect();
    }
    const answer = { ticket: "unused", websocket_url: "wss://relay.example/api/v1/ai-gateway/ws/scripted", subprotocols: ["x", "y"] };
    const given = [];
    class Recorder extends EventTarget { constructor(...all) { super(); given.push(all); setTimeout(() => this.onclose({ code: 1006 })); } close() {} }
    for (const options of [{}, { endpoint: "a/b", protocols: ["x", "z"] }, { url: "https://other.example" }]) {
      await createAIGatewayClient({ provider: "scripted", getTicket: () => answer, WebSocket: Recorder, ...options }).connect().catch(() => {});
    }
    expect(given).toEqual([
      [answer.websocket_url, ["x", "y"]],
      [`${answer.websocket_url}/a/b`, ["x", "z", "y"]],
      ["wss://other.example/api/v1/ai-gateway/ws/scripted", ["x", "y"]],
    ]);
  });

  test("OpenAI's client and its answer name `realtime` once", async () => {
    const client = createOpenAIRealtimeClient({ WebSocket: PageSocket, getTicket: `${backend}?provider=openai` });
    used.length = 0;
    await client.connect();
    client.disconnect();
    expect(used[0].protocols).toEqual(["realtime", expect.stringMatching(/^cf-aig-authorization\.rt_/)]);
  });

  test("a refused handshake says why, although the ticket is used up", async () => {
    const client = inPage({ getTicket: async () => (await ask("openai")).ticket });
    await expect(client.connect()).rejects.toMatchObject({ code: "ticket_mismatch", status: 403, source: "relay", message: expect.stringMatching(/for the provider 'openai'/) });
    const { ticket } = await ask("scripted");
    const first = inPage({ getTicket: () => ticket });
    await first.connect();
    await expect(inPage({ getTicket: () => ticket }).connect()).rejects.toMatchObject({ code: "ticket_invalid", message: expect.stringMatching(/used already/) });
    first.disconnect();
    await expect(scripted({ getTicket: async () => (await ask("scripted")).ticket }).connect()).rejects.toMatchObject({ code: "origin_required" });
    await expect(inPage({ endpoint: "refuses", getTicket: async () => (await ask("scripted")).ticket }).connect()).rejects.toMatchObject({ code: "handshake_refused", status: 403 });
  });

  test.each([[401, 401], [503, 1013], [429, 1013]])("a backend that answers %i gives no ticket", async (answered, status) => {
    await expect(inPage({ getTicket: `${backend}?status=${answered}` }).connect()).rejects.toMatchObject({ code: "connect_failed", status });
    expect(used).toEqual([]);
  });

  test("a session goes on trying while the backend cannot be reached, and not after it says no", async () => {
    let asked = 0;
    const urls = [`${backend}?provider=scripted`, "http://127.0.0.1:9", `${backend}?status=500`, `${backend}?provider=scripted`];
    // A URL is read anew for each connection, so this one can change.
    const client = inPage({ getTicket: { toString: () => urls[asked++] } });
    await client.connect();
    const restored = next(client, "reconnected");
    client.send({ do: "drop" });
    await restored;
    expect(asked).toBe(4);
    urls.push(`${backend}?status=403`);
    const ended = next(client, "error");
    client.send({ do: "drop" });
    expect((await ended).error).toMatchObject({ code: "connect_failed", status: 403 });
    expect(client.state).toBe("closed");
  });
});

describe("REST", () => {
  const chat = { model: "gpt-5", messages: [{ role: "user", content: "hi" }] };

  test("request gives the Response", async () => {
    const response = await aiGateway.request({ provider: "openai", endpoint: "chat/completions", data: chat, headers: { "OpenAI-Beta": "assistants=v1" } });
    expect(response.status).toBe(200);
    expect((await response.json()).choices[0].message.content).toBe("Hello wörld");
    expect((await (await aiGateway.request({ provider: "openai", endpoint: "models" })).json()).object).toBe("list");
  });

  test("forms and bytes go as they are", async () => {
    const form = new FormData();
    form.append("file", new Blob(["content"]), "f.txt");
    expect((await (await aiGateway.request({ provider: "openai", endpoint: "files", data: form })).json()).object).toBe("file");
  });

  test("stream gives SSE events", async () => {
    let text = "";
    for await (const event of aiGateway.stream({ provider: "openai", endpoint: "chat/completions", data: { ...chat, stream: true } }))
      if (event.data !== "[DONE]") text += event.json().choices[0].delta.content ?? "";
    expect(text).toBe("Hello wörld");
  });

  test("stream gives bytes of anything else", async () => {
    let bytes = 0;
    for await (const chunk of aiGateway.stream({ provider: "openai", endpoint: "audio/speech", data: { input: "hi" } })) bytes += chunk.length;
    expect(bytes).toBe(16384);
  });

  test("a provider's header is not taken for the relay's", async () => {
    const spoofs = createServer((request, response) => response.writeHead(200, { "x-relay-error": "rate_limited" }).end("{}"));
    await new Promise((listening) => spoofs.listen(0, "127.0.0.1", listening));
    const answer = await createAIGateway({ url: `http://127.0.0.1:${spoofs.address().port}` }).request({ provider: "x", endpoint: "y" });
    spoofs.close();
    expect(answer.status).toBe(200);
  });

  test("what the relay refuses is thrown; a provider's own error is an answer, but of a stream", async () => {
    await expect(aiGateway.request({ provider: "nobody", endpoint: "x" })).rejects.toMatchObject({ code: "unknown_provider", status: 404, source: "relay", requestId: expect.stringMatching(/^.{36}$/) });
    const answer = await aiGateway.request({ provider: "openai", endpoint: "nowhere" });
    expect(answer.status).toBe(404);
    const streaming = aiGateway.stream({ provider: "openai", endpoint: "nowhere" });
    await expect(streaming.next()).rejects.toBeInstanceOf(AIGatewayError);
  });

  test("no relay, and an abort, are typed", async () => {
    await expect(createAIGateway({ url: "http://127.0.0.1:9" }).request({ provider: "x", endpoint: "y" })).rejects.toMatchObject({ code: "relay_unreachable" });
    const controller = new AbortController();
    controller.abort();
    await expect(aiGateway.request({ provider: "openai", endpoint: "models", signal: controller.signal })).rejects.toMatchObject({ code: "aborted" });
  });

  test("a stream that is cut is not taken for whole", async () => {
    const events = [];
    await expect((async () => { for await (const event of aiGateway.stream({ provider: "scripted", endpoint: "cut" })) events.push(event.data); })()).rejects.toMatchObject({ code: "relay_unreachable" });
    expect(events).toEqual(["1"]);
  });

  test("leaving the loop cancels the call", async () => {
    for await (const event of aiGateway.stream({ provider: "scripted", endpoint: "endless" })) { expect(event.data).toBe("tick"); break; }
    for (let tries = 0; ; tries++) {
      const { cancelled } = await (await aiGateway.request({ provider: "seen", endpoint: "cancelled" })).json();
      if (cancelled) break;
      expect(tries).toBeLessThan(100);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  });
});
