/** Types of AIGatewayChat.jsx. Copy them together. */
import type { ReactElement } from "react";

export interface AIGatewayChatProps {
  /** How it starts; the user can switch, and the conversation continues. `chat` */
  mode?: "chat" | "realtime" | undefined;
  /**
   * A provider of gateway.yaml that speaks OpenAI's chat completions, and for the mode `realtime`
   * OpenAI's Realtime. `openai`
   */
  provider?: string | undefined;
  /** The model of the chat. `gpt-5-mini` */
  model?: string | undefined;
  /** The model of realtime sessions; by default what gateway.yaml says. */
  realtimeModel?: string | undefined;
  /** The relay, if it is not this page's origin. */
  url?: string | undefined;
  /** A key of the relay's own. */
  token?: string | undefined;
  /** A new ticket for every realtime session, as in AIGatewayClient.js. */
  getTicket?: string | (() => string | { ticket: string } | Promise<string | { ticket: string }>) | undefined;
  /** The system prompt. */
  instructions?: string | undefined;
  /** The heading, and the name for screen readers. `Chat` */
  title?: string | undefined;
  /** `auto` follows the system (prefers-color-scheme). */
  theme?: "auto" | "light" | "dark" | undefined;
  /** Shown before the first message. */
  greeting?: string | undefined;
  /** Questions that the greeting offers; a click asks one. */
  examples?: readonly string[] | undefined;
}

export default function AIGatewayChat(props: AIGatewayChatProps): ReactElement;
