// A page of another origin: the vendors' browser SDKs, unmodified, with tickets of its backend.
// tests/web/test_ticket_pages.py bundles and runs it.
import { Conversation } from "@elevenlabs/client";
import { GoogleGenAI, Modality } from "@google/genai";
import { OpenAIRealtimeWebSocket as AgentsWebSocket, RealtimeAgent, RealtimeSession } from "@openai/agents-realtime";
import { OpenAIRealtimeWebSocket } from "openai/realtime/websocket";
import { createOpenAIRealtimeClient } from "../../../web/AIGatewayClient.js";

const ask = async (provider) => (await fetch(`/ticket?provider=${provider}`, { method: "POST" })).json();

/** Each opens a session with a ticket, and returns what the provider said. */
window.sessions = {
  async openai(relay) {
    const { openai_ticket: apiKey } = await ask("openai");
    const session = new OpenAIRealtimeWebSocket({ model: "gpt-realtime" }, { apiKey, baseURL: `${relay}/providers/openai` });
    const usage = await new Promise((resolve, reject) => {
      session.on("error", reject);
      session.on("session.created", () => session.send({ type: "response.create" }));
      session.on("response.done", (event) => resolve(event.response.usage));
    });
    session.close();
    return usage.total_tokens;
  },

  async agents(relay) {
    const { openai_ticket: apiKey, websocket_url: url } = await ask("openai");
    const transport = new AgentsWebSocket({ url: `${url}?model=gpt-realtime` });
    const session = new RealtimeSession(new RealtimeAgent({ name: "helper", instructions: "be brief" }), { transport, model: "gpt-realtime" });
    const said = new Promise((resolve, reject) => {
      session.on("error", (event) => reject(event.error ?? event));
      transport.on("*", (event) => { if (event.type === "response.done") resolve(event.response.usage.total_tokens); });
    });
    await session.connect({ apiKey });
    transport.sendEvent({ type: "response.create" });
    const total = await said;
    session.close();
    return total;
  },

  async genai(relay) {
    const { ticket } = await ask("google-ai-studio");
    const client = new GoogleGenAI({ apiKey: ticket, httpOptions: { baseUrl: `${relay}/providers/google-ai-studio` } });
    let session;
    const said = await new Promise((resolve, reject) => {
      const callbacks = { onmessage: (message) => message.text && resolve(message.text), onerror: reject, onclose: reject };
      client.live.connect({ model: "gemini-live", config: { responseModalities: [Modality.TEXT] }, callbacks }).then((opened) => {
        session = opened;
        session.sendClientContent({ turns: "hi" });
      }, reject);
    });
    session.close();
    return said;
  },

  async elevenlabs(relay) {
    const { ticket, websocket_url: url } = await ask("elevenlabs");
    const said = Promise.withResolvers();
    const session = await Conversation.startSession({
      agentId: "agent", origin: url, authorization: ticket, connectionType: "websocket", textOnly: true,
      onMessage: ({ message }) => said.resolve(message), onError: said.reject,
    });
    const message = await said.promise;
    await session.endSession();
    return message;
  },

  async own(relay) {
    const client = createOpenAIRealtimeClient({ getTicket: "/ticket?provider=openai" });
    await client.connect();
    client.send({ type: "response.create" });
    for await (const message of client) if (message.type === "response.done") { client.disconnect(); return message.response.usage.total_tokens; }
  },

  /** A browser hides why a handshake failed; the client asks the relay. */
  async refused(relay) {
    const ticket = await ask("elevenlabs");
    const client = createOpenAIRealtimeClient({ url: relay, getTicket: () => ticket.ticket, reconnect: false });
    return client.connect().then(() => "opened", ({ code, status }) => `${status} ${code}`);
  },
};
