// @anthropic-ai/sdk: messages and stream.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ apiKey: process.env.CLIENT_KEY, baseURL: process.env.BASE, maxRetries: 0 });
const asked = { model: "claude-x", max_tokens: 10, messages: [{ role: "user", content: "hi" }] };
assert.equal((await client.messages.create(asked)).content[0].text, "Hi");
const final = await client.messages.stream(asked).finalMessage();
assert.equal(final.content[0].text, "Hi");
assert.equal(final.usage.output_tokens, 6);
console.log("ok");
