/**
 * The client of the AI gateway relay for browsers and Node 20+: realtime sessions, REST and streams
 * of any provider, without the provider's key. AIGatewayClient.d.ts describes every name.
 * @module
 */

const API = "/api/v1/ai-gateway";

/** Error codes of close codes, and whether the session is restored after one. */
const CLOSES = {
  1001: ["going_away", true], 1002: ["protocol_error"], 1003: ["unsupported_data"],
  1006: ["connection_lost", true], 1007: ["not_utf8"], 1008: ["refused"],
  1009: ["message_too_large"], 1011: ["provider_lost", true], 1012: ["restarting", true],
  1013: ["try_later", true], 1014: ["upstream_failed", true], 4401: ["access_revoked"],
  4402: ["budget_exhausted"], 4408: ["idle_timeout"], 4409: ["session_too_long"],
};

/** Every failure of this module. */
export class AIGatewayError extends Error {
  name = "AIGatewayError"; code; status; source; requestId;
  /** @type {any[]} */
  unsent = [];

  /** @param {string} code @param {string} message @param {any} [facts] */
  constructor(code, message, { status = 0, source = "client", requestId = "", cause } = {}) {
    super(message, { cause });
    Object.assign(this, { code, status, source, requestId });
  }
}

/** @typedef {import("./AIGatewayClient.d.ts").SessionOptions<any, any>} SessionOptions */

/** One realtime session. Iterating it ends with a normal close, and throws on any other. */
export class AIGatewaySession extends EventTarget {
  #options; #socket; #timer; #drain; #early; #attempt = 0; #wanted = false; #state = "closed";
  /** @type {any[]} not given to a socket yet */
  #queue = [];
  /** @type {any[]} given to the socket, perhaps still in its buffer */
  #handed = [];
  /** @type {any[]} */
  #readers = [];

  /** @param {SessionOptions} options */
  constructor(options) {
    super();
    /** @type {any} */
    const defaults = { maxBufferedBytes: 1 << 20, connectTimeoutMs: 20_000, protocols: [] };
    this.#options = { ...defaults, ...withoutUndefined(options) };
    options.signal?.addEventListener("abort", () => this.disconnect(1000, "aborted"));
  }

  get state() { return this.#state; }

  get bufferedAmount() {
    const queued = this.#queue.reduce((sum, { message }) => sum + size(message), 0);
    return (this.#socket?.bufferedAmount ?? 0) + queued;
  }

  async connect() {
    if (this.#wanted) throw new AIGatewayError("already_connected", "The session is open already.");
    const { signal } = this.#options;
    if (signal?.aborted) throw new AIGatewayError("aborted", "The signal was aborted.");
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

  /** @param {any} message @returns {Promise<void>} */
  send(message) {
    const { outgoing } = this.#options;
    const made = outgoing ? outgoing(message) : message;
    const sent = new Promise((done, failed) => {
      const item = { message: isPlain(made) ? JSON.stringify(made) : made, done, failed };
      if (!this.#wanted) {
        return this.#lose([item], new AIGatewayError("not_connected", "Call connect() first."));
      }
      this.#queue.push(item);
      this.#flush();
    });
    sent.catch(() => {}); // the error event reports it
    return sent;
  }

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
    // A reader that starts right after connect() misses no message.
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
    try {
      await this.#dial();
    } catch (cause) {
      if (cause instanceof AIGatewayError) throw cause;
      throw new AIGatewayError("connect_failed", cause?.message ?? `${cause}`, { cause });
    }
  }

  async #dial() {
    const { getTicket, token, protocols, connectTimeoutMs } = this.#options;
    const Socket = await constructor(this.#options.WebSocket);
    const given = getTicket ? await ticketFrom(getTicket, this.#options.signal) : token;
    this.#check();
    const { ticket: secret, websocket_url, subprotocols } = given?.ticket ? given : { ticket: given };
    const url = sessionUrl(this.#options, websocket_url);
    const secrets = subprotocols ?? (secret ? [`cf-aig-authorization.${secret}`] : []);
    const socket = new Socket(url, [...new Set([...protocols, ...secrets])]);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.onmessage = ({ data }) => this.#received(data);
    this.#early = [];
    let timer;
    const closed = await new Promise((resolve) => {
      const fail = (reason) => resolve({ code: 1006, reason });
      timer = setTimeout(fail, connectTimeoutMs, "timed out");
      socket.onopen = () => resolve(null);
      socket.onclose = resolve;
      // Node 22 fires only this.
      socket.onerror = () => setTimeout(fail);
    });
    clearTimeout(timer);
    if (closed) {
      socket.onclose = null;
      socket.close();
      this.#check();
      throw await refusal(url, closed, secret);
    }
    socket.onclose = (event) => this.#closed(socket, event);
    this.#state = "open";
    this.#emit("open", {});
    this.#flush();
    setTimeout(() => (this.#early = null));
  }

  #received(data) {
    this.#attempt = 0;
    const message = parsed(data, this.#options.binaryJson);
    this.#early?.push(message);
    for (const reader of this.#readers) { reader.items.push(message); reader.wake?.(); }
    this.#emit("message", { data: message }, message);
  }

  #closed(socket, { code, reason }) {
    // What is still in the socket's buffer was not sent.
    let left = socket.bufferedAmount;
    const unsent = [];
    while (left > 0 && this.#handed.length) {
      const last = this.#handed.pop();
      left -= last.bytes;
      unsent.unshift({ message: last.message, done: () => {}, failed: () => {} });
    }
    this.#handed = [];
    this.#queue.unshift(...unsent);
    const normal = code === 1000 || code === 1005;
    const [name, retryable] = CLOSES[code] ?? [normal ? "closed" : "session_closed"];
    const clean = normal || !this.#wanted;
    const text = reason || `The session was closed with ${code}.`;
    const error = clean ? null : new AIGatewayError(name, text, { status: code, source: "relay" });
    if (this.#wanted && retryable) this.#retry(error, { code, reason });
    else this.#end(error, { code, reason });
  }

  #retry(error, event) {
    const { reconnect } = this.#options;
    const { attempts = 8, baseMs = 500, capMs = 30_000 } = reconnect || {};
    if (reconnect === false || this.#attempt >= attempts) return this.#end(error, event);
    const delayMs = Math.random() * Math.min(capMs, baseMs * 2 ** this.#attempt++);
    this.#state = "reconnecting";
    this.#emit("reconnecting", { attempt: this.#attempt, delayMs, error });
    this.#timer = setTimeout(async () => {
      try {
        await this.#open();
        this.#emit("reconnected", { attempt: this.#attempt });
      } catch (again) {
        if (this.#wanted && CLOSES[again.status]?.[1]) this.#retry(again, event);
        else if (this.#wanted) this.#end(again, event);
      }
    }, delayMs);
  }

  #flush() {
    const socket = this.#socket;
    if (socket?.readyState !== 1) return;
    const { maxBufferedBytes } = this.#options;
    while (this.#queue.length && socket.bufferedAmount < maxBufferedBytes) this.#hand(socket);
    // A WebSocket has no event for a buffer that has room again.
    clearTimeout(this.#drain);
    if (this.#queue.length) this.#drain = setTimeout(() => this.#flush(), 20);
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
    if (lost.length) {
      const text = "Closed before these were sent.";
      this.#lose(lost, error ?? new AIGatewayError("closed", text, { status: event.code }));
    } else if (error && was !== "closed") this.#fail(error);
    for (const reader of this.#readers) { reader.ended = error ?? true; reader.wake?.(); }
    if (was !== "closed") this.#emit("close", { code: event.code, reason: event.reason });
  }

  #lose(items, error) {
    error.unsent = items.map(({ message }) => message);
    for (const { failed } of items) failed(error);
    this.#fail(error);
  }

  #fail(error) { this.#emit("error", { error }, error); }

  /** Dispatch an event, and call its callback: open and onOpen. */
  #emit(type, facts, argument = facts) {
    this.dispatchEvent(Object.assign(new Event(type), facts));
    this.#options[`on${type[0].toUpperCase()}${type.slice(1)}`]?.(argument);
  }
}

/** @param {SessionOptions} options */
export const createAIGatewayClient = (options) => new AIGatewaySession(options);

/** @param {SessionOptions} [options] */
export const createOpenAIRealtimeClient = (options = {}) =>
  createAIGatewayClient({
    provider: "openai", outgoing: modernized, ...withoutUndefined(options),
    protocols: ["realtime", ...(options.protocols ?? [])],
  });

/** @param {SessionOptions} [options] */
export const createGeminiLiveClient = (options = {}) =>
  createAIGatewayClient({
    provider: "google-ai-studio", binaryJson: true, ...withoutUndefined(options),
  });

/** @param {SessionOptions} [options] */
export const createCartesiaClient = (options = {}) =>
  createAIGatewayClient({ provider: "cartesia", ...withoutUndefined(options) });

/** @param {SessionOptions & {voiceId?: string, agentId?: string}} [options] */
export function createElevenLabsClient({ voiceId, agentId, ...options } = {}) {
  const { model } = options;
  const asked = { agent_id: agentId || undefined, model_id: (voiceId && model) || undefined };
  const query = withoutUndefined({ ...asked, ...options.query });
  const speech = voiceId && `v1/text-to-speech/${encodeURIComponent(voiceId)}/stream-input`;
  const made = { provider: "elevenlabs", endpoint: speech, protocols: voiceId ? [] : ["convai"] };
  return createAIGatewayClient({ ...made, ...withoutUndefined(options), query, model: undefined });
}

/** @param {SessionOptions & {app?: string}} [options] */
export function createFalClient({ app, ...options } = {}) {
  const endpoint = app && `${app}/realtime`;
  return createAIGatewayClient({ provider: "fal", endpoint, ...withoutUndefined(options) });
}

/** @typedef {import("./AIGatewayClient.d.ts").Call} Call */

/** @param {{url?: string, token?: string}} [options] */
export function createAIGateway({ url, token } = {}) {
  /** @param {Call} call @returns {Promise<Response>} */
  async function send({ provider, endpoint, data, method, headers, signal }) {
    const json = isPlain(data);
    const target = `${origin(url)}${API}/providers/${provider}/${endpoint}`;
    /** @type {any} */
    const init = {
      method: method ?? (data === undefined ? "GET" : "POST"),
      headers: {
        ...(json && { "content-type": "application/json" }),
        ...(token && { authorization: `Bearer ${token}` }),
        ...headers,
      },
      body: json ? JSON.stringify(data) : data,
      signal,
      duplex: "half",
    };
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
    request: send,

    /** @param {Call} call @returns {AsyncGenerator<any>} */
    async *stream(call) {
      const response = await send(call);
      if (!response.ok) throw await failure(response);
      const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
      const type = response.headers.get("content-type");
      const parse = type?.startsWith("text/event-stream") ? eventParser() : null;
      try {
        for (;;) {
          const { done, value } = await reader.read().catch((cause) => {
            throw failed(cause, call.signal);
          });
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

export const aiGateway = createAIGateway();

/** @returns {(chunk: Uint8Array) => Generator<import("./AIGatewayClient.d.ts").SSEvent>} */
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
        const json = () => JSON.parse(text);
        if (data.length) yield { event: event || "message", data: text, id, json };
        data = [];
        event = "";
      }
    }
  };
}

function modernized(message) {
  const { type, response, session } = message ?? {};
  if (type === "response.create" && response?.modalities) {
    return { ...message, response: renamed(response) };
  }
  if (type === "session.update" && session) {
    return { ...message, session: { type: "realtime", ...renamed(session) } };
  }
  return message;
}

function renamed({ modalities, ...rest }) {
  if (!modalities) return rest;
  return { output_modalities: modalities.includes("audio") ? ["audio"] : modalities, ...rest };
}

/** @param {any} options */
const withoutUndefined = (options) =>
  Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));

const isPlain = (data) =>
  Array.isArray(data) || (data && [Object.prototype, null].includes(Object.getPrototypeOf(data)));

const size = (message) =>
  typeof message === "string" ? new Blob([message]).size : message.byteLength ?? message.size;

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
  if (!given) throw new AIGatewayError("no_url", "Pass `url`, or set RELAY_URL.");
  return given.replace(/\/+$/, "").replace(/\/api\/v1\/ai-gateway$/, "");
}

/** @param {any} getTicket */
async function ticketFrom(getTicket, signal) {
  if (typeof getTicket === "function") return getTicket();
  const init = { method: "POST", signal }; // with the cookies of the page's origin
  /** @type {any} */
  const response = await fetch(getTicket, init).catch((cause) => ({ status: 500, cause }));
  const { ok, status, cause } = response;
  if (ok) return response.json();
  throw new AIGatewayError("connect_failed", `No ticket was given (${cause ?? status}).`, {
    status: status === 429 || status > 499 ? 1013 : status, cause,
  });
}

/** @param {any} options @param {string} [ticketUrl] */
function sessionUrl({ url, provider, endpoint, model, query }, ticketUrl) {
  const base = new URL(origin(url ?? ticketUrl).replace(/^http/, "ws"));
  const tail = endpoint ? `/${endpoint}` : "";
  if (base.pathname === "/") base.pathname = `${API}/ws/${provider}${tail}`;
  else if (!url && base.pathname.endsWith(`/ws/${provider}`)) base.pathname += tail;
  const parameters = withoutUndefined({ model: model || undefined, ...query });
  for (const [name, value] of Object.entries(parameters)) base.searchParams.set(name, value);
  return base.href;
}

async function constructor(given) {
  const found = given ?? globalThis.WebSocket;
  if (found) return found;
  const name = "ws";
  return import(/* @vite-ignore */ name).then((module) => module.WebSocket, () => {
    throw new AIGatewayError("no_websocket", "No WebSocket: use Node 22, or install `ws`.");
  });
}

/** The error of a refused handshake. A WebSocket does not have it; a GET of its URL does. */
async function refusal(url, { code, reason }, secret) {
  const init = secret && { headers: { authorization: `Bearer ${secret}` } };
  const response = await fetch(url.replace(/^ws/, "http"), init).catch(() => null);
  const error = response && relayError(response);
  if (error && error !== "upgrade_required") return failure(response);
  const text = response
    ? "The provider did not open the session"
    : "The relay cannot be reached, or does not allow this page's origin";
  const why = reason ? ` (${reason})` : "";
  return new AIGatewayError("connect_failed", `${text}${why}.`, { status: code });
}

const relayError = ({ headers }) =>
  headers.get("x-relay-error-source") === "relay" && headers.get("x-relay-error");

async function failure(response) {
  const text = await response.text().catch(() => "");
  let message = text.slice(0, 500);
  try {
    const { error, detail, message: plain } = JSON.parse(text);
    const inner = error ?? detail ?? plain;
    message = inner?.message ?? (typeof inner === "string" ? inner : message);
  } catch {}
  const code = relayError(response) || "provider_error";
  return new AIGatewayError(code, message || `The answer has status ${response.status}.`, {
    status: response.status,
    source: response.headers.get("x-relay-error-source") ?? "provider",
    requestId: response.headers.get("cf-aig-log-id") ?? "",
  });
}

const failed = (cause, signal) =>
  signal?.aborted
    ? new AIGatewayError("aborted", "The call was aborted.", { cause })
    : new AIGatewayError(
        "relay_unreachable", "The connection to the relay failed, or was cut.", { cause },
      );
