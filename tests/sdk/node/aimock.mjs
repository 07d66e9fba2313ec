// An upstream that we did not write: prints its URL, serves until it is ended.
import { LLMock } from "@copilotkit/aimock";

const mock = new LLMock({ port: 0, host: "127.0.0.1" });
mock.onMessage("hello", { content: "Hi from aimock!" });
await mock.start();
console.log(mock.url);
