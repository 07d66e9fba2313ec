// @google/genai: generate, stream, a resumable upload, a live session with the key in its query.
import assert from "node:assert/strict";
import { writeFileSync, mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { GoogleGenAI, Modality } from "@google/genai";

const client = new GoogleGenAI({ apiKey: process.env.CLIENT_KEY, httpOptions: { baseUrl: process.env.BASE } });
const model = "gemini-2.5-flash";
assert.equal((await client.models.generateContent({ model, contents: "hi" })).text, "Hi");
const texts = [];
for await (const chunk of await client.models.generateContentStream({ model, contents: "hi" })) texts.push(chunk.text);
assert.deepEqual(texts, ["Hi", "Hi"]);

const path = join(mkdtempSync(join(tmpdir(), "genai-")), "big.txt");
writeFileSync(path, Buffer.alloc(10_000_000, "x"));
const file = await client.files.upload({ file: path, config: { mimeType: "text/plain" } });
assert.equal(file.name, "files/abc");

let session;
const said = await new Promise((resolve, reject) => {
  client.live
    .connect({
      model: "gemini-live",
      config: { responseModalities: [Modality.TEXT] },
      callbacks: { onmessage: (message) => message.text && resolve(message.text), onerror: reject },
    })
    .then((opened) => {
      session = opened;
      session.sendClientContent({ turns: "hi" });
    }, reject);
});
assert.equal(said, "Hello from Gemini");
session.close();
console.log("ok");
