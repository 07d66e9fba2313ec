// An upstream that we did not write: prints its URL, serves until it is ended.
import { LLMock } from "@copilotkit/aimock";

const NOTE = "note.txt";
// How each agent reads a file, by the tool that it offers. The first argument is its work folder.
const folder = process.argv[2] ?? ".";
const readers = {
  Read: { file_path: `${folder}/${NOTE}` },
  read: { filePath: `${folder}/${NOTE}` },
  read_file: { file_path: `${folder}/${NOTE}` },
  exec_command: { cmd: `cat ${NOTE}` },
};
const edit = [NOTE, "<<<<<<< SEARCH", "a note of the test", "=======", "a changed note", ">>>>>>> REPLACE"].join("\n");

const usage = { prompt_tokens: 20, completion_tokens: 5, input_tokens: 20, output_tokens: 5, promptTokenCount: 20, candidatesTokenCount: 5 };

const mock = new LLMock({ port: 0, host: "127.0.0.1" });
const agents = ["first", "second"].map((name) => ({
  name: "Agent",
  arguments: JSON.stringify({ description: name, prompt: `hello from the ${name} agent`, subagent_type: "general-purpose", run_in_background: false }),
}));
mock.addFixture({ match: { userMessage: "Let two agents work", hasToolResult: true }, response: { content: "Both agents have worked.", usage } });
mock.addFixture({ match: { userMessage: "Let two agents work", hasToolResult: false }, response: { toolCalls: agents, usage } });
mock.onMessage("Change the note", { content: edit, usage });
mock.addFixture({ match: { hasToolResult: true, toolResultContains: "a note of the test" }, response: { content: "The tool has read the note.", usage } });
for (const [name, args] of Object.entries(readers)) {
  const toolCalls = [{ name, arguments: JSON.stringify(args) }];
  mock.addFixture({ match: { userMessage: NOTE, toolName: name, hasToolResult: false }, response: { toolCalls, usage } });
}
mock.onMessage("hello", { content: "Hi from aimock!", usage });
// What agents ask beside the prompt: a title, a summary.
mock.addFixture({ match: { predicate: () => true }, response: { content: "A note", usage } });
await mock.start();
console.log(mock.url);
