// openai: chat, stream, and a realtime session.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { checkSession } from "./realtime.mjs";

const key = process.env.CLIENT_KEY;
const client = new OpenAI({ apiKey: key, baseURL: process.env.BASE, maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const answer = await client.chat.completions.create({ model: "gpt-5", messages });
assert.equal(answer.choices[0].message.content, "Hello wörld");
let text = "";
for await (const chunk of await client.chat.completions.create({ model: "gpt-5", messages, stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, "Hello wörld");
const response = await client.responses.create({ model: "gpt-5", input: "hi" });
assert.equal(response.output_text, "Hello wörld");

const secure = new OpenAI({ apiKey: key, baseURL: process.env.TLS_BASE });
await checkSession(secure, "gpt-realtime");
console.log("ok");
