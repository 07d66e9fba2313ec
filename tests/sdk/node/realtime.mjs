// A realtime session of openai's SDK, for the scripts that open one. It opens wss:// whatever its
// base URL says.
import assert from "node:assert/strict";
import { OpenAIRealtimeWS } from "openai/realtime/ws";

export async function checkSession(client, model) {
  const session = new OpenAIRealtimeWS({ model }, client);
  const usage = await new Promise((resolve, reject) => {
    session.on("error", reject);
    session.on("session.created", () => session.send({ type: "response.create" }));
    session.on("response.done", (event) => resolve(event.response.usage));
  });
  assert.equal(usage.total_tokens, 253);
  session.close();
}
