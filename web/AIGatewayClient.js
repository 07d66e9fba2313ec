/**
 * The browser's client of the AI gateway relay: sessions, REST and streams of any provider, without a key. Node 20+ too.
 * @module
 */

const API = "/api/v1/ai-gateway";

/** What a close code says, and whether a new connection may help. The relay's own: docs/errors.md. */
const CLOSES = {
  1001: ["going_away", true], 1002: ["protocol_error"], 1003: ["unsupported_data"], 1006: ["connection_lost", true],
  1007: ["not_utf8"], 1008: ["refused"], 1009: ["message_too_large"], 1011: ["provider_lost", true], 1012: ["restarting", true],
  1013: ["try_later", true], 1014: ["upstream_failed", true], 4408: ["idle_timeout"], 4409: ["session_too_long"],
};

/**
 * Every failure: `code` (docs/errors.md), `status` (HTTP's, or the close code), `source` (relay, cloudflare, provider,
 * client), `unsent` messages.
 */
export class AIGatewayError extends Error {
  name = "AIGatewayError"; code; status; source; requestId;
  /** @type {any[]} */
  unsent = [];

  /** @param {string} code @param {string} message @param {{status?: number, source?: string, requestId?: string, cause?: unknown}} [facts] */
  constructor(code, message, { status = 0, source = "client", requestId = "", cause } = {}) {
    super(message, { cause });
    Object.assign(this, { code, status, source, requestId });
  }
}

/** @typedef {import("./options.d.ts").SessionOptions} SessionOptions */

/**
 * One session. Events: open, message (`data`), error (`error`), close (`code`, `reason`), reconnecting, reconnected.
 * `for await (const message of client)` ends with a normal close and throws on any other.
 */
export class AIGatewaySession extends EventTarget {
  #options; #socket; #timer; #drain; #early; #attempt = 0; #wanted = false; #state = "closed";
  /** @type {any[]} not handed to a socket yet */
  #queue = [];
  /** @type {any[]} handed over, perhaps still in its buffer */
  #handed = [];
  /** @type {any[]} */
  #readers = [];

  /** @param {SessionOptions} options */
  constructor(options) {
    super();
    this.#options = { maxBufferedBytes: 1 << 20, connectTimeoutMs: 20_000, protocols: [], ...options };
    options.signal?.addEventListener("abort", () => this.disconnect(1000, "aborted"));
  }

  /** closed, connecting, open or reconnecting. */
  get state() { return this.#state; }

  /** Bytes that have not left yet. */
  get bufferedAmount() {
    return (this.#socket?.bufferedAmount ?? 0) + this.#queue.reduce((sum, { message }) => sum + size(message), 0);
  }

  /** Open the session. Rejects with an AIGatewayError that says why it could not be. */
  async connect() {
    if (this.#wanted) throw new AIGatewayError("already_connected", "The session is open already.");
    if (this.#options.signal?.aborted) throw new AIGatewayError("aborted", "The signal was aborted.");
    this.#wanted = true;
    this.#attempt = 0;
    this.#state = "connecting";
    try {
      await this.#open();
    } catch (error) {
      this.#end(error);
      throw error;
    }
  }

  /**
   * Send an object as JSON, a string, an ArrayBuffer, a view or a Blob. The promise, for backpressure, resolves once the
   * socket has it. While the connection is restored messages wait; what is not sent in the end is in `error.unsent`.
   * @param {any} message @returns {Promise<void>}
   */
  send(message) {
    const { outgoing } = this.#options;
    const made = outgoing ? outgoing(message) : message;
    const sent = new Promise((done, failed) => {
      const item = { message: isPlain(made) ? JSON.stringify(made) : made, done, failed };
      if (!this.#wanted) return this.#lose([item], new AIGatewayError("not_connected", "Call connect() first."));
      this.#queue.push(item);
      this.#flush();
    });
    sent.catch(() => {}); // the error event tells
    return sent;
  }

  /** Say goodbye. What was sent before still goes out. */
  disconnect(code = 1000, reason = "") {
    this.#wanted = false;
    clearTimeout(this.#timer);
    const socket = this.#socket;
    if (socket?.readyState === 1) {
      while (this.#queue.length) this.#hand(socket);
      socket.close(code, reason);
    } else {
      socket?.close();
      this.#end(null, { code, reason });
    }
  }

  async *[Symbol.asyncIterator]() {
    // What came with the opening is not missed.
    const reader = /** @type {any} */ ({ items: this.#early ?? [] });
    this.#early = null;
    this.#readers.push(reader);
    try {
      for (;;) {
        while (reader.items.length) yield reader.items.shift();
        if (reader.ended === true) return;
        if (reader.ended) throw reader.ended;
        await new Promise((wake) => (reader.wake = wake));
      }
    } finally {
      this.#readers = this.#readers.filter((other) => other !== reader);
    }
  }

  #check() { if (!this.#wanted) throw new AIGatewayError("aborted", "disconnect() was called."); }

  async #open() {
    const { getTicket, token, protocols, connectTimeoutMs } = this.#options;
    const Socket = await constructor(this.#options.WebSocket);
    const secret = getTicket ? await getTicket() : token;
    this.#check();
    const url = sessionUrl(this.#options);
    const socket = new Socket(url, secret ? [...protocols, `cf-aig-authorization.${secret}`] : protocols);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.onmessage = ({ data }) => this.#received(data);
    this.#early = [];
    const closed = await new Promise((resolve) => {
      const timer = setTimeout(() => resolve({ code: 1006, reason: "no answer in time" }), connectTimeoutMs);
      socket.onopen = () => { clearTimeout(timer); resolve(null); };
      socket.onclose = (event) => { clearTimeout(timer); resolve(event); };
      socket.onerror = () => {};
    });
    if (closed) {
      socket.onclose = null;
      socket.close();
      this.#check();
      throw await refusal(url, closed, secret);
    }
    socket.onclose = (event) => this.#closed(socket, event);
    this.#state = "open";
    this.#tell("open", {});
    this.#flush();
    setTimeout(() => (this.#early = null));
  }

  #received(data) {
    this.#attempt = 0;
    const message = parsed(data, this.#options.binaryJson);
    this.#early?.push(message);
    for (const reader of this.#readers) { reader.items.push(message); reader.wake?.(); }
    this.#tell("message", { data: message }, message);
  }

  #closed(socket, { code, reason }) {
    // What the socket still holds did not leave.
    let left = socket.bufferedAmount;
    const unsent = [];
    while (left > 0 && this.#handed.length) {
      const last = this.#handed.pop();
      left -= last.bytes;
      unsent.unshift({ message: last.message, done: () => {}, failed: () => {} });
    }
    this.#handed = [];
    this.#queue.unshift(...unsent);
    const [name, retryable] = CLOSES[code] ?? [code === 1000 || code === 1005 ? "closed" : "session_closed"];
    const clean = name === "closed" || !this.#wanted;
    const error = clean ? null : new AIGatewayError(name, reason || `The session was closed with ${code}.`, { status: code, source: "relay" });
    if (this.#wanted && retryable) this.#retry(error, { code, reason });
    else this.#end(error, { code, reason });
  }

  #retry(error, event) {
    const { reconnect } = this.#options;
    const { attempts = 8, baseMs = 500, capMs = 30_000 } = reconnect || {};
    if (reconnect === false || this.#attempt >= attempts) return this.#end(error, event);
    const delayMs = Math.random() * Math.min(capMs, baseMs * 2 ** this.#attempt++);
    this.#state = "reconnecting";
    this.#tell("reconnecting", { attempt: this.#attempt, delayMs, error });
    this.#timer = setTimeout(async () => {
      try {
        await this.#open();
        this.#tell("reconnected", { attempt: this.#attempt });
      } catch (again) {
        if (this.#wanted && CLOSES[again.status]?.[1]) this.#retry(again, event);
        else if (this.#wanted) this.#end(again, event);
      }
    }, delayMs);
  }

  #flush() {
    const socket = this.#socket;
    while (this.#queue.length && socket?.readyState === 1 && socket.bufferedAmount < this.#options.maxBufferedBytes) this.#hand(socket);
    // A socket does not say when it has room again.
    clearTimeout(this.#drain);
    if (this.#queue.length && socket?.readyState === 1) this.#drain = setTimeout(() => this.#flush(), 20);
  }

  #hand(socket) {
    const { message, done } = this.#queue.shift();
    if (!socket.bufferedAmount) this.#handed = [];
    socket.send(message);
    this.#handed.push({ message, bytes: size(message) });
    done();
  }

  #end(error, event = { code: 1006, reason: "" }) {
    const was = this.#state;
    this.#wanted = false;
    this.#state = "closed";
    clearTimeout(this.#timer);
    const lost = this.#queue.splice(0);
    if (lost.length) this.#lose(lost, error ?? new AIGatewayError("closed", "Closed before these were sent.", { status: event.code }));
    else if (error && was !== "closed") this.#fail(error);
    for (const reader of this.#readers) { reader.ended = error ?? true; reader.wake?.(); }
    if (was !== "closed") this.#tell("close", { code: event.code, reason: event.reason });
  }

  #lose(items, error) {
    error.unsent = items.map(({ message }) => message);
    for (const { failed } of items) failed(error);
    this.#fail(error);
  }

  #fail(error) { this.#tell("error", { error }, error); }

  /** An event, and its callback: open and onOpen. */
  #tell(type, facts, told = facts) {
    this.dispatchEvent(Object.assign(new Event(type), facts));
    this.#options[`on${type[0].toUpperCase()}${type.slice(1)}`]?.(told);
  }
}

/** A session with any provider. @param {SessionOptions & {provider: string}} options */
export const createAIGatewayClient = (options) => new AIGatewaySession(options);

/**
 * OpenAI Realtime. Outdated fields become today's.
 * @param {SessionOptions} [options]
 */
export const createOpenAIRealtimeClient = (options = {}) =>
  createAIGatewayClient({ provider: "openai", outgoing: modernized, ...options, protocols: ["realtime", ...(options.protocols ?? [])] });

/** Gemini Live; the first message is `setup`. @param {SessionOptions} [options] */
export const createGeminiLiveClient = (options = {}) => createAIGatewayClient({ provider: "google-ai-studio", binaryJson: true, ...options });

/** Cartesia's speech socket. @param {SessionOptions} [options] */
export const createCartesiaClient = (options = {}) => createAIGatewayClient({ provider: "cartesia", ...options });

/** ElevenLabs: speech with a `voiceId`, a conversation with an `agentId`. @param {SessionOptions & {voiceId?: string, agentId?: string}} [options] */
export function createElevenLabsClient({ voiceId, agentId, ...options } = {}) {
  const query = { ...(agentId && { agent_id: agentId }), ...(voiceId && options.model && { model_id: options.model }), ...options.query };
  const endpoint = voiceId ? `v1/text-to-speech/${encodeURIComponent(voiceId)}/stream-input` : undefined;
  const protocols = voiceId ? [] : ["convai"];
  return createAIGatewayClient({ provider: "elevenlabs", endpoint, protocols, ...options, query, model: undefined });
}

/** fal realtime; `app` is such as `fal-ai/fast-lcm-diffusion`. @param {SessionOptions & {app?: string}} [options] */
export const createFalClient = ({ app, ...options } = {}) => createAIGatewayClient({ provider: "fal", endpoint: app && `${app}/realtime`, ...options });

/** @typedef {import("./options.d.ts").Call} Call */

/** REST through the relay at `url`; by default this page's origin. @param {{url?: string, token?: string}} [options] */
export function createAIGateway({ url, token } = {}) {
  /** @param {Call} call @returns {Promise<Response>} */
  async function send({ provider, endpoint, data, method, headers, signal }) {
    const json = isPlain(data);
    const all = { ...(json && { "content-type": "application/json" }), ...(token && { authorization: `Bearer ${token}` }), ...headers };
    const target = `${origin(url)}${API}/providers/${provider}/${endpoint}`;
    /** @type {any} */
    const init = { method: method ?? (data === undefined ? "GET" : "POST"), headers: all, body: json ? JSON.stringify(data) : data, signal, duplex: "half" };
    let response;
    try {
      response = await fetch(target, init);
    } catch (cause) {
      throw failed(cause, signal);
    }
    if (relayError(response)) throw await failure(response);
    return response;
  }
  return {
    /** One call. A provider's own error is a Response like any other; what the relay refuses is thrown. @param {Call} call */
    request: send,

    /** The same as it comes: SSE events, or Uint8Arrays of anything else. Leaving the loop cancels the call. @param {Call} call @returns {AsyncGenerator<any>} */
    async *stream(call) {
      const response = await send(call);
      if (!response.ok) throw await failure(response);
      const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
      const parse = response.headers.get("content-type")?.startsWith("text/event-stream") ? eventParser() : null;
      try {
        for (;;) {
          const { done, value } = await reader.read().catch((cause) => { throw failed(cause, call.signal); });
          if (done) return;
          if (parse) yield* parse(value);
          else yield value;
        }
      } finally {
        reader.cancel().catch(() => {});
      }
    },
  };
}

/** REST through the relay on this page's origin (in Node: RELAY_URL). */
export const aiGateway = createAIGateway();

/** @returns {(chunk: Uint8Array) => Generator<import("./options.d.ts").SSEvent>} */
function eventParser() {
  const decoder = new TextDecoder();
  let held = "", data = [], event = "", id = "";
  return function* (chunk) {
    held += decoder.decode(chunk, { stream: true });
    const lines = held.split(/\r\n|\n|\r(?!$)/);
    held = /** @type {string} */ (lines.pop());
    for (const line of lines) {
      const [, name, value] = /** @type {any} */ (/^([^:]*):? ?(.*)$/s.exec(line));
      if (name === "data") data.push(value);
      else if (name === "event") event = value;
      else if (name === "id") id = value;
      else if (!line) {
        const text = data.join("\n");
        if (data.length) yield { event: event || "message", data: text, id, json: () => JSON.parse(text) };
        data = [];
        event = "";
      }
    }
  };
}

function modernized(message) {
  if (message?.type === "response.create" && message.response?.modalities) return { ...message, response: renamed(message.response) };
  if (message?.type === "session.update" && message.session) return { ...message, session: { type: "realtime", ...renamed(message.session) } };
  return message;
}

const renamed = ({ modalities, ...rest }) => (modalities ? { output_modalities: modalities.includes("audio") ? ["audio"] : modalities, ...rest } : rest);

const isPlain = (data) => Array.isArray(data) || (data && [Object.prototype, null].includes(Object.getPrototypeOf(data)));

const size = (message) => (typeof message === "string" ? new Blob([message]).size : message.byteLength ?? message.size);

function parsed(data, binaryJson) {
  if (typeof data !== "string" && !binaryJson) return data;
  try {
    return JSON.parse(typeof data === "string" ? data : new TextDecoder().decode(data));
  } catch {
    return data;
  }
}

function origin(url) {
  const given = url ?? globalThis.location?.origin ?? globalThis.process?.env?.RELAY_URL;
  if (!given) throw new AIGatewayError("no_url", "Pass `url`, or set RELAY_URL: there is no page here.");
  return given.replace(/\/+$/, "").replace(/\/api\/v1\/ai-gateway$/, "");
}

/** @param {any} options */
function sessionUrl({ url, provider, endpoint, model, query }) {
  const base = new URL(origin(url).replace(/^http/, "ws"));
  if (base.pathname === "/") base.pathname = `${API}/ws/${provider}${endpoint ? `/${endpoint}` : ""}`;
  for (const [name, value] of Object.entries({ ...(model && { model }), ...query })) base.searchParams.set(name, value);
  return base.href;
}

async function constructor(given) {
  const found = given ?? globalThis.WebSocket;
  if (found) return found;
  const name = "ws";
  return import(/* @vite-ignore */ name).then((module) => module.WebSocket, () => {
    throw new AIGatewayError("no_websocket", "No WebSocket here: use Node 22, or install `ws`.");
  });
}

/** A WebSocket does not say why it was refused; a GET of its URL does. */
async function refusal(url, { code, reason }, secret) {
  const init = secret && { headers: { authorization: `Bearer ${secret}` } };
  const response = await fetch(url.replace(/^ws/, "http"), init).catch(() => null);
  const error = response && relayError(response);
  if (error && error !== "upgrade_required") return failure(response);
  const text = response ? "The provider did not open the session" : "The relay cannot be reached, or does not allow this page's origin";
  return new AIGatewayError("connect_failed", `${text}${reason ? ` (${reason})` : ""}.`, { status: code });
}

const relayError = ({ headers }) => headers.get("x-relay-error-source") === "relay" && headers.get("x-relay-error");

async function failure(response) {
  const text = await response.text().catch(() => "");
  let message = text.slice(0, 500);
  try {
    const { error, detail, message: plain } = JSON.parse(text);
    const inner = error ?? detail ?? plain;
    message = inner?.message ?? (typeof inner === "string" ? inner : message);
  } catch {}
  return new AIGatewayError(relayError(response) || "provider_error", message || `Answered with ${response.status}.`, {
    status: response.status,
    source: response.headers.get("x-relay-error-source") ?? "provider",
    requestId: response.headers.get("cf-aig-log-id") ?? "",
  });
}

const failed = (cause, signal) =>
  signal?.aborted
    ? new AIGatewayError("aborted", "The call was aborted.", { cause })
    : new AIGatewayError("relay_unreachable", "The connection to the relay failed, or was cut.", { cause });
