import {
  aiGateway,
  AIGatewayError,
  type AIGatewaySession,
  type ClientErrorCode,
  createAIGateway,
  createAIGatewayClient,
  createCartesiaClient,
  createElevenLabsClient,
  createFalClient,
  createGeminiLiveClient,
  createOpenAIRealtimeClient,
  type RelayErrorCode,
  type SSEvent,
  type SessionOptions,
  type SessionState,
  type Ticket,
} from "./utils/AIGatewayClient";

type Equal<A, B> =
  (<T>() => T extends A ? 1 : 2) extends (<T>() => T extends B ? 1 : 2) ? true : false;
/** Compiles for `true` only: holds<Equal<A, B>>(). */
const holds = <Condition extends true>(condition?: Condition): void => void condition;

/** The ways to give a page its tickets. */
export const getTickets: SessionOptions["getTicket"][] = [
  "/ticket",
  new URL("https://app.example.com/ticket"),
  () => "rt_ticket",
  async () => (await (await fetch("/ticket", { method: "POST" })).json()) as Ticket,
];

export async function talk(token: string | undefined): Promise<string> {
  const client = createOpenAIRealtimeClient({
    token,
    model: "gpt-realtime",
    reconnect: { attempts: 3 },
    onMessage: (message) => holds<Equal<typeof message.type, string>>(),
    onError: (error) => holds<Equal<typeof error, AIGatewayError>>(),
    onReconnecting: ({ attempt, delayMs, error }) => attempt + delayMs + error.status,
    onClose: ({ code, reason }) => `${code} ${reason}`,
  });
  client.addEventListener("message", (event) => event.data.type.toUpperCase());
  client.addEventListener("close", ({ code, reason }) => [code.toFixed(), reason.trim()]);
  client.addEventListener("reconnecting", ({ delayMs, error }) => [delayMs, error.code]);
  await client.connect();
  holds<Equal<typeof client.state, SessionState>>();
  await client.send({ type: "response.create", response: { output_modalities: ["text"] } });
  for await (const message of client) if (message.type === "response.done") break;
  client.disconnect(1000, "done");

  // @ts-expect-error the option is `model`
  createOpenAIRealtimeClient({ modle: "gpt-realtime" });
  // @ts-expect-error there is no such event
  client.addEventListener("mesage", () => {});
  // @ts-expect-error an event of OpenAI's has a type
  await client.send({ response: {} });
  // @ts-expect-error the state is read only
  client.state = "open";
  // @ts-expect-error a session needs a provider or a URL
  createAIGatewayClient({ model: "x" });
  // @ts-expect-error only false switches reconnecting off, and nothing but options changes it
  createFalClient({ app: "fal-ai/fast", reconnect: true });
  return client.state;
}

/** The caller may give the types of a session's messages. */
export function typed(): AIGatewaySession<{ done: boolean }, { text: string }> {
  const session = createCartesiaClient<{ done: boolean }, { text: string }>();
  session.addEventListener("message", ({ data }) => holds<Equal<typeof data, { done: boolean }>>());
  // @ts-expect-error the field is `text`
  void session.send({ words: "hello" });
  return session;
}

export const others = [
  createGeminiLiveClient({ model: "gemini-live", signal: new AbortController().signal }),
  createElevenLabsClient({ voiceId: "voice", getTicket: async () => "ticket" }),
  createElevenLabsClient({ agentId: "agent", WebSocket }),
  createAIGatewayClient({ url: "wss://ai.example.com/api/v1/ai-gateway/ws/openai" }),
];

export async function rest(): Promise<number> {
  const gateway = createAIGateway({ url: "https://ai.example.com" });
  const call = { provider: "openai", endpoint: "chat/completions", data: { stream: true } };
  const response: Response = await gateway.request(call);
  for await (const event of aiGateway.stream(call)) {
    holds<Equal<typeof event, SSEvent>>();
    if (event.data !== "[DONE]") event.json<{ id: string }>().id.trim();
  }
  let bytes = 0;
  for await (const chunk of gateway.stream<Uint8Array>(call)) bytes += chunk.byteLength;
  // @ts-expect-error a call needs an endpoint
  await gateway.request({ provider: "openai" });
  // @ts-expect-error a body is text, bytes or an object
  await gateway.request({ ...call, data: 5 });
  return bytes + response.status;
}

export function explain(error: unknown): string {
  if (!(error instanceof AIGatewayError)) return "not of the relay";
  const [first] = error.unsent;
  // @ts-expect-error there may be no unsent message
  first.toString();
  // @ts-expect-error there is no such source
  if (error.source === "nginx") return "";
  switch (error.code) {
    case "rate_limited":
      return `${error.source} ${error.status} ${error.requestId}`;
    case "connection_lost":
      return String(first);
    default:
      return error.message;
  }
}

export const known: [RelayErrorCode, ClientErrorCode] = ["rate_limited", "connection_lost"];
// @ts-expect-error there is no such code
export const unknown: RelayErrorCode = "rate_limitted";
