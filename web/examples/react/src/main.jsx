import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import AIGatewayChat from "./components/AIGatewayChat";

// The provider `demo` answers without any key. With an OpenAI key in the relay's .env:
// ?provider=openai&model=gpt-5-mini. Every other property with text is one more parameter.
const chosen = Object.fromEntries(new URLSearchParams(location.search));

createRoot(document.getElementById("root")).render(
  <StrictMode>
    <AIGatewayChat provider="demo" model="demo-chat" {...chosen} />
  </StrictMode>,
);
