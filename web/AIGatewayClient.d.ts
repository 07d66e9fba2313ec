/**
 * Types of AIGatewayClient.js, written by hand; a test compares the names of both files. Copy them
 * together.
 */

/** What the relay refuses a call with; docs/errors.md says for each what to do. */
export type RelayErrorCode =
  | "access_revoked"
  | "address_not_allowed"
  | "bad_path"
  | "bad_request"
  | "body_timeout"
  | "body_too_slow"
  | "budget_busy"
  | "budget_exhausted"
  | "budget_not_found"
  | "client_conflict"
  | "client_gone"
  | "client_key_expired"
  | "client_key_invalid"
  | "client_key_missing"
  | "client_not_found"
  | "client_stalled"
  | "config_invalid"
  | "cross_site_request"
  | "draining"
  | "endpoint_not_allowed"
  | "endpoint_not_supported"
  | "handshake_refused"
  | "host_not_allowed"
  | "internal_error"
  | "key_not_found"
  | "ledger_busy"
  | "log_not_found"
  | "limits_unknown"
  | "management_denied"
  | "management_not_local"
  | "method_not_allowed"
  | "model_missing"
  | "model_not_allowed"
  | "model_not_found"
  | "model_not_in_session"
  | "model_unknown"
  | "object_not_found"
  | "origin_not_allowed"
  | "origin_required"
  | "overloaded"
  | "price_unknown"
  | "provider_not_allowed"
  | "provider_not_configured"
  | "query_timeout"
  | "rate_limited"
  | "session_ended"
  | "session_not_found"
  | "store_unavailable"
  | "target_ambiguous"
  | "target_not_allowed"
  | "ticket_invalid"
  | "ticket_mismatch"
  | "too_many_attempts"
  | "too_many_sessions"
  | "unknown_provider"
  | "unknown_route"
  | "upgrade_required"
  | "upstream_disconnected"
  | "upstream_error_in_answer"
  | "upstream_protocol_error"
  | "upstream_timeout"
  | "upstream_tls_failed"
  | "upstream_unreachable"
  | "websocket_not_supported"
  | "workers_incomplete"
  | "wrong_body";

/** What this client reports by itself; docs/browser.md lists them. */
export type ClientErrorCode =
  | "aborted"
  | "access_revoked"
  | "already_connected"
  | "budget_exhausted"
  | "closed"
  | "connect_failed"
  | "connection_lost"
  | "going_away"
  | "idle_timeout"
  | "message_too_large"
  | "no_url"
  | "no_websocket"
  | "not_connected"
  | "not_utf8"
  | "protocol_error"
  | "provider_error"
  | "provider_lost"
  | "refused"
  | "relay_unreachable"
  | "restarting"
  | "session_closed"
  | "session_too_long"
  | "try_later"
  | "unsupported_data"
  | "upstream_failed";

/** Open, because a newer relay may have a code that this file does not list. */
export type AIGatewayErrorCode = RelayErrorCode | ClientErrorCode | (string & {});

/** Whose error it is. */
export type AIGatewayErrorSource = "relay" | "cloudflare" | "provider" | "client";

/** A message as the socket takes it: objects are JSON by then. */
export type EncodedMessage = string | ArrayBuffer | ArrayBufferView | Blob;

/** What every failure of this module is. */
export class AIGatewayError extends Error {
  constructor(
    code: AIGatewayErrorCode,
    message: string,
    facts?: {
      status?: number | undefined;
      source?: AIGatewayErrorSource | undefined;
      requestId?: string | undefined;
      cause?: unknown;
    },
  );
  name: "AIGatewayError";
  code: AIGatewayErrorCode;
  /** The HTTP status, or the close code of a session; 0 if there is none. */
  status: number;
  source: AIGatewayErrorSource;
  /** The relay's id of the call (`cf-aig-log-id`); empty if there is none. */
  requestId: string;
  /** Messages that were not sent, in order. */
  unsent: EncodedMessage[];
}

export type SessionState = "closed" | "connecting" | "open" | "reconnecting";

export interface CloseDetail {
  readonly code: number;
  readonly reason: string;
}

export interface ReconnectingDetail {
  /** 1 for the first attempt since the last message arrived. */
  readonly attempt: number;
  readonly delayMs: number;
  /** Why the connection ended. */
  readonly error: AIGatewayError;
}

export interface ReconnectedDetail {
  readonly attempt: number;
}

/** The events of a session by name. */
export interface SessionEventMap<Incoming = any> {
  open: Event;
  /** JSON is parsed, other text is a string, a binary message an ArrayBuffer. */
  message: Event & { readonly data: Incoming };
  error: Event & { readonly error: AIGatewayError };
  close: Event & CloseDetail;
  reconnecting: Event & ReconnectingDetail;
  reconnected: Event & ReconnectedDetail;
}

/** How a lost connection is restored. The wait is random up to a cap that doubles (full jitter). */
export interface ReconnectOptions {
  /** 8 */
  attempts?: number | undefined;
  /** The first cap of the wait, 500. */
  baseMs?: number | undefined;
  /** The last cap of the wait, 30000. */
  capMs?: number | undefined;
}

/** What POST …/tickets answers. Its URL is used unless `url` is given. */
export interface Ticket {
  ticket: string;
  /** Unix time in seconds. */
  expires_at?: number | undefined;
  websocket_url?: string | undefined;
  subprotocols?: readonly string[] | undefined;
  /** The same ticket as OpenAI's browser SDKs insist on it. */
  openai_ticket?: string | undefined;
}

export interface SessionOptions<Incoming = any, Outgoing = string | object> {
  /** As in gateway.yaml. createOpenAIRealtimeClient and the other makers have a default. */
  provider?: string | undefined;
  /** By default the provider's realtime endpoint. */
  endpoint?: string | undefined;
  /**
   * The relay (`https://ai.example.com`), or a whole `wss://…` URL. By default this page's origin,
   * in Node the variable RELAY_URL.
   */
  url?: string | undefined;
  /** By default what gateway.yaml says (`default_query`). */
  model?: string | undefined;
  query?: Record<string, string> | undefined;
  /** More subprotocols. */
  protocols?: readonly string[] | undefined;
  /** A key of the relay's own. It is sent as a subprotocol, never in the URL. */
  token?: string | undefined;
  /**
   * Replaces `token` with a new ticket for every connection: a function, or the URL of your backend,
   * which is called with POST and answers with what the relay's POST …/tickets answered.
   */
  getTicket?: string | URL | (() => string | Ticket | Promise<string | Ticket>) | undefined;
  /** Ends the session for good. */
  signal?: AbortSignal | undefined;
  /** false: a lost connection ends the session. */
  reconnect?: false | ReconnectOptions | undefined;
  /** Above it `send` queues messages; 1 MiB. */
  maxBufferedBytes?: number | undefined;
  /** 20000 */
  connectTimeoutMs?: number | undefined;
  /** A constructor, where there is neither a global one nor the package `ws`. */
  WebSocket?: (new (url: string, protocols?: string[]) => unknown) | undefined;
  /** Binary messages are JSON, as from Gemini Live. */
  binaryJson?: boolean | undefined;
  /** Changes a message before it is sent. */
  outgoing?: ((message: Outgoing) => unknown) | undefined;
  onOpen?: (() => void) | undefined;
  onMessage?: ((message: Incoming) => void) | undefined;
  onError?: ((error: AIGatewayError) => void) | undefined;
  onClose?: ((detail: CloseDetail) => void) | undefined;
  onReconnecting?: ((detail: ReconnectingDetail) => void) | undefined;
  onReconnected?: ((detail: ReconnectedDetail) => void) | undefined;
}

/** One realtime session. Iterating it ends with a normal close, and throws on any other. */
export class AIGatewaySession<Incoming = any, Outgoing = string | object> extends EventTarget {
  constructor(options: SessionOptions<Incoming, Outgoing>);
  get state(): SessionState;
  /** Bytes that have not been sent yet. */
  get bufferedAmount(): number;
  /** Open the session. Rejects with an AIGatewayError that says why it could not be opened. */
  connect(): Promise<void>;
  /** Send JSON (an object or an array), a string, or bytes. Resolves once the socket has it. */
  send(message: Outgoing): Promise<void>;
  /** Close the session; what was sent before is still delivered. */
  disconnect(code?: number, reason?: string): void;
  [Symbol.asyncIterator](): AsyncGenerator<Incoming, void, undefined>;
  addEventListener<Type extends keyof SessionEventMap>(
    type: Type,
    listener: ((event: SessionEventMap<Incoming>[Type]) => void) | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<Type extends keyof SessionEventMap>(
    type: Type,
    listener: ((event: SessionEventMap<Incoming>[Type]) => void) | null,
    options?: boolean | EventListenerOptions,
  ): void;
}

/** A JSON event with a `type`. The SDKs of OpenAI have exact types: pass them as type arguments. */
export interface TypedEvent {
  type: string;
  [field: string]: any;
}

/** A session with any provider. */
export function createAIGatewayClient<Incoming = any, Outgoing = string | object>(
  options: SessionOptions<Incoming, Outgoing> & ({ provider: string } | { url: string }),
): AIGatewaySession<Incoming, Outgoing>;

/** OpenAI Realtime. Outdated fields (`modalities`) become today's. */
export function createOpenAIRealtimeClient<Incoming = TypedEvent, Outgoing = TypedEvent>(
  options?: SessionOptions<Incoming, Outgoing>,
): AIGatewaySession<Incoming, Outgoing>;

/** Gemini Live. The first message to send is `setup`. */
export function createGeminiLiveClient<
  Incoming = Record<string, any>,
  Outgoing = Record<string, any>,
>(options?: SessionOptions<Incoming, Outgoing>): AIGatewaySession<Incoming, Outgoing>;

/** Cartesia's speech socket. */
export function createCartesiaClient<Incoming = TypedEvent, Outgoing = Record<string, any>>(
  options?: SessionOptions<Incoming, Outgoing>,
): AIGatewaySession<Incoming, Outgoing>;

/** ElevenLabs: speech with a `voiceId`, a conversation with an `agentId`. */
export function createElevenLabsClient<
  Incoming = Record<string, any>,
  Outgoing = Record<string, any>,
>(
  options?: SessionOptions<Incoming, Outgoing> & {
    voiceId?: string | undefined;
    agentId?: string | undefined;
  },
): AIGatewaySession<Incoming, Outgoing>;

/** fal realtime; `app` is such as `fal-ai/fast-lcm-diffusion`. */
export function createFalClient<Incoming = any, Outgoing = string | object>(
  options?: SessionOptions<Incoming, Outgoing> & { app?: string | undefined },
): AIGatewaySession<Incoming, Outgoing>;

/** One REST call. */
export interface Call {
  /** As in gateway.yaml. */
  provider: string;
  /** Such as `chat/completions`. */
  endpoint: string;
  /** A plain object or an array is sent as JSON, anything else as fetch sends it. */
  data?: string | object | undefined;
  /** By default POST with data, GET without. */
  method?: string | undefined;
  headers?: Record<string, string> | undefined;
  signal?: AbortSignal | undefined;
}

/** One server-sent event. */
export interface SSEvent {
  /** `message` if the stream does not name it. */
  event: string;
  data: string;
  id: string;
  /** `data` parsed; throws a SyntaxError if it is not JSON (`[DONE]`). */
  json<Value = any>(): Value;
}

export interface AIGateway {
  /**
   * One call. A provider's own error is a Response like any other; what the relay refuses is thrown
   * as an AIGatewayError.
   */
  request(call: Call): Promise<Response>;
  /**
   * The same call as it streams: SSE events, or `stream<Uint8Array>(…)` for any other content type.
   * Leaving the loop cancels the call; a stream that is cut throws.
   */
  stream<Chunk extends SSEvent | Uint8Array = SSEvent>(
    call: Call,
  ): AsyncGenerator<Chunk, void, undefined>;
}

/** REST through the relay at `url`; by default this page's origin, in Node RELAY_URL. */
export function createAIGateway(options?: {
  url?: string | undefined;
  /** A key of the relay's own. */
  token?: string | undefined;
}): AIGateway;

/** REST through the relay of this page's origin, in Node of RELAY_URL. */
export const aiGateway: AIGateway;
