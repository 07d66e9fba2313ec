import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import AIGatewayChat from "./components/AIGatewayChat";

// The provider `demo` answers without any key. With an OpenAI key in the relay's .env:
// ?provider=openai&model=gpt-5-mini. `url` and `token` are no parameters: with them a link to this
// page could send what its user writes to another host.
const NAMES = [
  "provider", "model", "realtimeModel", "mode", "theme", "instructions", "title", "greeting",
];
const parameters = [...new URLSearchParams(location.search)];
const chosen = Object.fromEntries(parameters.filter(([name]) => NAMES.includes(name)));

createRoot(document.getElementById("root")).render(
  <StrictMode>
    <AIGatewayChat provider="demo" model="demo-chat" {...chosen} />
  </StrictMode>,
);
