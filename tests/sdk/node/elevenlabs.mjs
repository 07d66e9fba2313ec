// @elevenlabs/elevenlabs-js: a speech stream.
import assert from "node:assert/strict";
import { ElevenLabsClient } from "@elevenlabs/elevenlabs-js";

const client = new ElevenLabsClient({ apiKey: process.env.CLIENT_KEY, baseUrl: process.env.BASE });
let bytes = 0;
for await (const piece of await client.textToSpeech.stream("voice", { text: "hello there" })) bytes += piece.length;
assert.equal(bytes, 1024);
const { data, rawResponse } = await client.textToSpeech.stream("voice", { text: "hi" }).withRawResponse();
assert.equal(rawResponse.headers.get("character-cost"), "11");
await data.cancel();
console.log("ok");
