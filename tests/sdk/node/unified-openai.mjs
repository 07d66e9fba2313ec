// openai on /v1: the case that the first argument names.
import assert from "node:assert/strict";
import OpenAI, { NotFoundError } from "openai";

const client = new OpenAI({ apiKey: process.env.CLIENT_KEY, baseURL: `${process.env.BASE}/v1` });
const messages = [{ role: "user", content: "hi" }];
const cases = {
  async chat(model) {
    const answer = await client.chat.completions.create({ model, messages });
    assert.equal(answer.choices[0].message.content, "Hello wörld");
  },
  async stream(model) {
    let text = "";
    const stream = await client.chat.completions.create({ model, messages, stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, "Hello wörld");
  },
  async responses(model) {
    assert.equal((await client.responses.create({ model, input: "hi" })).output_text, "Hello wörld");
  },
  async models(model) {
    const ids = [];
    for await (const each of client.models.list()) ids.push(each.id);
    assert.ok(ids.includes(model) && ids.includes("anthropic/claude-sonnet-5"), String(ids));
  },
  async unknown(model) {
    const refused = await client.chat.completions.create({ model, messages }).catch((error) => error);
    assert.ok(refused instanceof NotFoundError, String(refused));
    assert.equal(refused.code, "model_not_found");
  },
};
await cases[process.argv[2]](process.argv[3]);
console.log("ok");
