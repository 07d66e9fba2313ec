import type { AIGatewayError } from "./AIGatewayClient.js";

/** What a session is made of. */
export interface SessionOptions {
  /** As in gateway.yaml; the makers (createOpenAIRealtimeClient, …) set it. */
  provider?: string;
  /** Without it the provider's realtime one. */
  endpoint?: string;
  /** The relay (`https://ai.example.com`), or a whole `wss://…` URL. By default this page's origin; in Node RELAY_URL. */
  url?: string;
  /** By default what gateway.yaml says (`default_query`). */
  model?: string;
  query?: Record<string, string>;
  /** Subprotocols besides. */
  protocols?: string[];
  /** A key of the relay's own; sent as a subprotocol, never in the URL. */
  token?: string;
  /** Asked before every connection; what it gives takes the token's place. */
  getTicket?: () => string | Promise<string>;
  /** Ends the session for good. */
  signal?: AbortSignal;
  /** 8 attempts, 500 ms, 30 s unless said otherwise; the wait is random up to the cap (full jitter). false: none. */
  reconnect?: false | { attempts?: number; baseMs?: number; capMs?: number };
  /** Above it `send` holds messages back; 1 MiB. */
  maxBufferedBytes?: number;
  /** 20 s. */
  connectTimeoutMs?: number;
  /** A constructor, where there is no global one and no package `ws`. */
  WebSocket?: any;
  /** JSON comes in binary frames, as from Gemini Live. */
  binaryJson?: boolean;
  /** Changes a message on its way out. */
  outgoing?: (message: any) => any;
  onOpen?: () => void;
  /** JSON parsed, other text as it is, binary as ArrayBuffer. */
  onMessage?: (message: any) => void;
  onError?: (error: AIGatewayError) => void;
  onClose?: (event: { code: number; reason: string }) => void;
  onReconnecting?: (event: { attempt: number; delayMs: number; error: AIGatewayError }) => void;
  onReconnected?: (event: { attempt: number }) => void;
}

/** One REST call. */
export interface Call {
  provider: string;
  endpoint: string;
  /** JSON if a plain object or array, else a body as fetch takes it. */
  data?: any;
  /** POST with data, GET without. */
  method?: string;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

/** One server-sent event. */
export interface SSEvent {
  event: string;
  data: string;
  id: string;
  json: () => any;
}
