// openai: a realtime session on /v1, whose model picks the provider. It opens wss:// always.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { OpenAIRealtimeWS } from "openai/realtime/ws";

const client = new OpenAI({ apiKey: process.env.CLIENT_KEY, baseURL: `${process.env.TLS_BASE}/v1` });
const session = new OpenAIRealtimeWS({ model: process.argv[2] }, client);
const usage = await new Promise((resolve, reject) => {
  session.on("error", reject);
  session.on("session.created", () => session.send({ type: "response.create" }));
  session.on("response.done", (event) => resolve(event.response.usage));
});
assert.equal(usage.total_tokens, 253);
session.close();
console.log("ok");
