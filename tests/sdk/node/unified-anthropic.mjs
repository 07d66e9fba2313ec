// @anthropic-ai/sdk on /v1: the case that the first argument names.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ apiKey: process.env.CLIENT_KEY, baseURL: process.env.BASE });
const messages = [{ role: "user", content: "hi" }];
const cases = {
  async messages(model) {
    assert.equal((await client.messages.create({ model, max_tokens: 10, messages })).content[0].text, "Hi");
  },
  async stream(model) {
    const final = await client.messages.stream({ model, max_tokens: 10, messages }).finalMessage();
    assert.equal(final.content[0].text, "Hi");
    assert.equal(final.usage.output_tokens, 6);
  },
  async count(model) {
    assert.equal((await client.messages.countTokens({ model, messages })).input_tokens, 12);
  },
  async models(model) {
    const ids = [];
    for await (const each of client.models.list()) ids.push(each.id);
    assert.ok(ids.includes(model), String(ids));
  },
};
await cases[process.argv[2]](process.argv[3]);
console.log("ok");
