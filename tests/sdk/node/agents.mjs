// @openai/agents-realtime over WebSocket; its `url` is taken as it is, ws:// too.
import assert from "node:assert/strict";
import { OpenAIRealtimeWebSocket, RealtimeAgent, RealtimeSession } from "@openai/agents-realtime";

const url = `${process.env.BASE.replace(/^http/, "ws")}/realtime?model=gpt-realtime`;
const transport = new OpenAIRealtimeWebSocket({ url });
const session = new RealtimeSession(new RealtimeAgent({ name: "helper", instructions: "be brief" }), { transport, model: "gpt-realtime" });
const seen = new Promise((resolve, reject) => {
  const types = [];
  session.on("error", (event) => reject(event.error ?? event));
  transport.on("*", (event) => {
    types.push(event.type);
    if (event.type === "response.done") resolve(types);
  });
});
await session.connect({ apiKey: process.env.CLIENT_KEY });
transport.sendEvent({ type: "response.create" });
const types = await seen;
assert.ok(types.includes("session.created"), String(types));
assert.ok(types.includes("response.output_text.delta"), String(types));
session.close();
console.log("ok");
process.exit(0);
