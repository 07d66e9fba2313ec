import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import AIGatewayChat from "./components/AIGatewayChat";

// The provider `demo` answers without any key. With an OpenAI key in the relay's .env: ?provider=openai&model=gpt-5-mini
const chosen = new URLSearchParams(location.search);

createRoot(document.getElementById("root")).render(
  <StrictMode>
    <AIGatewayChat provider={chosen.get("provider") ?? "demo"} model={chosen.get("model") ?? "demo-chat"} mode={chosen.get("mode") ?? "chat"} />
  </StrictMode>,
);
