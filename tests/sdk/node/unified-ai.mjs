// The AI SDK with its OpenAI, OpenAI-compatible and Anthropic providers on /v1: the case that the
// first argument names. The base URL of its Anthropic provider ends in /v1 too.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, embed } from "ai";

const options = { apiKey: process.env.CLIENT_KEY, baseURL: `${process.env.BASE}/v1` };
const openai = createOpenAI(options);
const compatible = createOpenAICompatible({ ...options, name: "relay", includeUsage: true });
const anthropic = createAnthropic(options);

const whole = async (model, said) => assert.equal((await generateText({ model, prompt: "hi" })).text, said);
const streamed = async (model, said) => {
  let text = "";
  for await (const piece of streamText({ model, prompt: "hi", onError: ({ error }) => { throw error; } }).textStream) text += piece;
  assert.equal(text, said);
};
const cases = {
  responses: (model) => whole(openai(model), "Hello wörld"),
  chat: (model) => whole(openai.chat(model), "Hello wörld"),
  "chat-stream": (model) => streamed(openai.chat(model), "Hello wörld"),
  async embed(model) {
    assert.deepEqual((await embed({ model: openai.embedding(model), value: "hi" })).embedding, [0.25, -0.5]);
  },
  compatible: (model) => whole(compatible(model), "Hello wörld"),
  "compatible-stream": (model) => streamed(compatible(model), "Hello wörld"),
  anthropic: (model) => whole(anthropic(model), "Hi"),
  "anthropic-stream": (model) => streamed(anthropic(model), "Hi"),
};
await cases[process.argv[2]](process.argv[3]);
console.log("ok");
