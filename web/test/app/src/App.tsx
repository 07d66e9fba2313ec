// A strict TypeScript app with copies of the client and of the component: tests/web/test_types.py
// compiles it. Each @ts-expect-error is a mistake that the types must refuse.
import AIGatewayChat, { type AIGatewayChatProps } from "./components/AIGatewayChat";

const optional: { token?: string } = {};
const props: AIGatewayChatProps = { mode: "realtime", theme: "dark", token: optional.token, getTicket: "/ticket" };

export function App() {
  return (
    <main>
      <AIGatewayChat />
      <AIGatewayChat {...props} examples={["What can you do?"]} />
      {/* @ts-expect-error there is no such mode */}
      <AIGatewayChat mode="voice" />
      {/* @ts-expect-error there is no such theme */}
      <AIGatewayChat theme="blue" />
      {/* @ts-expect-error the property is `model` */}
      <AIGatewayChat modle="gpt-5-mini" />
    </main>
  );
}
