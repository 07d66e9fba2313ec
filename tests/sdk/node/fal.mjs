// @fal-ai/client with proxyUrl: run, queue, stream.
import assert from "node:assert/strict";
import { createFalClient } from "@fal-ai/client";

const fal = createFalClient({ proxyUrl: { url: `${process.env.BASE}/proxy`, when: "always" }, credentials: process.env.CLIENT_KEY });
const input = { prompt: "a cat" };
assert.equal((await fal.run("fal-ai/flux", { input })).data.prompt, "a cat");
const queued = await fal.queue.submit("fal-ai/flux/schnell", { input });
assert.equal(queued.request_id, "r1");
const where = { requestId: queued.request_id };
assert.equal((await fal.queue.status("fal-ai/flux/schnell", where)).status, "COMPLETED");
assert.equal((await fal.queue.result("fal-ai/flux/schnell", where)).data.images[0].url, "https://v3.fal.media/files/q.png");
assert.equal((await fal.subscribe("fal-ai/flux", { input })).data.images.length, 1);
console.log("ok");
