/**
 * A chat with any model behind the AI gateway relay: text by SSE, or a realtime session by WebSocket. React 18 and 19.
 * Copy it to `src/components/`, and AIGatewayClient.js to `src/utils/`.
 *
 *   <AIGatewayChat model="gpt-5-mini" />
 *   <AIGatewayChat mode="realtime" />
 *
 * Looks come from CSS variables: --aigw-accent, --aigw-accent-text, --aigw-surface, --aigw-text, --aigw-muted, --aigw-border,
 * --aigw-error, --aigw-radius, --aigw-font.
 */
import { useCallback, useEffect, useId, useRef, useState } from "react";
import { aiGateway as ownOrigin, createAIGateway, createOpenAIRealtimeClient } from "../utils/AIGatewayClient";

/**
 * @param {object} props
 * @param {"chat" | "realtime"} [props.mode] how it starts; there is a switch
 * @param {string} [props.provider] as in gateway.yaml; it must speak OpenAI's chat completions, and Realtime for that mode
 * @param {string} [props.model] for chat
 * @param {string} [props.realtimeModel] by default what gateway.yaml says
 * @param {string} [props.url] the relay, if it is not this page's origin
 * @param {string} [props.token] a key of the relay's own
 * @param {string} [props.instructions] the system prompt
 * @param {string} [props.title]
 */
export default function AIGatewayChat({
  mode: startMode = "chat", provider = "openai", model = "gpt-5-mini", realtimeModel, url, token, instructions = "", title = "Chat",
}) {
  const [mode, setMode] = useState(startMode);
  const [messages, setMessages] = useState(/** @type {Message[]} */ ([]));
  const [draft, setDraft] = useState("");
  const [busy, setBusy] = useState(false);
  const [status, setStatus] = useState("");
  const log = useRef(/** @type {HTMLDivElement | null} */ (null));
  const box = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  const abort = useRef(/** @type {AbortController | null} */ (null));
  const session = useRef(/** @type {any} */ (null));
  const id = useId();

  /** Change the last message, which is the answer being written. */
  const answer = useCallback((change) => setMessages((all) => [...all.slice(0, -1), { ...all[all.length - 1], ...change(all[all.length - 1]) }]), []);
  const settle = useCallback((change = {}) => {
    answer((last) => (last.state === "writing" ? { state: "done", ...change } : {}));
    setBusy(false);
  }, [answer]);
  const fail = useCallback((error) => {
    answer((last) => (last.state === "writing" ? { state: "failed", error: error.message } : {}));
    setBusy(false);
  }, [answer]);

  useEffect(() => () => { abort.current?.abort(); session.current?.disconnect(); }, []);
  useEffect(() => { log.current?.scrollTo({ top: log.current.scrollHeight }); }, [messages]);

  async function chat(history) {
    abort.current = new AbortController();
    const gateway = url || token ? createAIGateway({ url, token }) : ownOrigin;
    const asked = [...(instructions ? [{ role: "system", content: instructions }] : []), ...history.map(({ role, text }) => ({ role, content: text }))];
    const call = { provider, endpoint: "chat/completions", data: { model, messages: asked, stream: true }, signal: abort.current.signal };
    let finished = false;
    for await (const event of gateway.stream(call)) {
      if (event.data === "[DONE]") { finished = true; break; }
      const said = event.json();
      if (said.error) throw new Error(said.error.message);
      const text = said.choices?.[0]?.delta?.content ?? "";
      if (said.choices?.[0]?.finish_reason) finished = true;
      if (text) answer((last) => ({ text: last.text + text }));
    }
    if (!finished) throw new Error("The answer ended early.");
    settle();
  }

  async function open() {
    if (session.current && session.current.state !== "closed") return session.current;
    const client = createOpenAIRealtimeClient({
      provider, url, token, model: realtimeModel,
      onMessage(event) {
        if (event.type === "response.output_text.delta" || event.type === "response.output_audio_transcript.delta") answer((last) => ({ text: last.text + event.delta }));
        else if (event.type === "response.done") event.response.status === "failed" ? fail(new Error(event.response.status_details?.error?.message ?? "The answer failed.")) : settle(event.response.status === "cancelled" ? { state: "stopped" } : {});
        else if (event.type === "error") fail(new Error(event.error.message));
      },
      onReconnecting({ attempt }) {
        setStatus(`Connection lost, reconnecting (attempt ${attempt})…`);
        fail(new Error("The connection was lost while this was written."));
      },
      onReconnected: () => setStatus("Connected again."),
      onError: fail,
      onClose: () => setStatus("Not connected."),
    });
    session.current = client;
    setStatus("Connecting…");
    await client.connect();
    setStatus("Connected.");
    return client;
  }

  async function realtime(history) {
    const client = await open();
    const last = history[history.length - 1];
    client.send({ type: "conversation.item.create", item: { type: "message", role: "user", content: [{ type: "input_text", text: last.text }] } });
    client.send({ type: "response.create", response: { output_modalities: ["text"], ...(instructions && { instructions }) } });
  }

  async function ask(history) {
    setMessages([...history, { role: "assistant", text: "", state: "writing" }]);
    setBusy(true);
    try {
      await (mode === "chat" ? chat : realtime)(history);
    } catch (error) {
      if (error.code === "aborted") settle({ state: "stopped" });
      else fail(error);
    }
  }

  function send(event) {
    event?.preventDefault();
    const text = draft.trim();
    if (!text || busy) return;
    setDraft("");
    ask([...messages, { role: "user", text, state: "done" }]);
  }

  function stop() {
    if (!busy) return;
    if (mode === "chat") abort.current?.abort();
    else session.current?.send({ type: "response.cancel" });
    if (mode === "realtime") settle({ state: "stopped" });
    box.current?.focus();
  }

  function retry() {
    const asked = messages.map(({ role }) => role).lastIndexOf("user");
    if (!busy && asked >= 0) ask(messages.slice(0, asked + 1));
  }

  function change(next) {
    stop();
    session.current?.disconnect();
    setMode(next);
    setStatus("");
  }

  const last = messages[messages.length - 1];
  return (
    <section className="aigw" aria-labelledby={`${id}-title`} onKeyDown={(event) => event.key === "Escape" && stop()}>
      <style>{STYLE}</style>
      <header>
        <h2 id={`${id}-title`}>{title}</h2>
        <fieldset>
          <legend className="aigw-hidden">How to talk</legend>
          {["chat", "realtime"].map((each) => (
            <label key={each}>
              <input type="radio" name={`${id}-mode`} checked={mode === each} onChange={() => change(each)} /> {each === "chat" ? "Chat" : "Realtime"}
            </label>
          ))}
        </fieldset>
      </header>
      <div ref={log} className="aigw-log" role="log" aria-live="polite" aria-busy={busy} tabIndex={0} aria-label="Conversation">
        {messages.map((message, at) => (
          <article key={at} className={`aigw-${message.role}`} data-state={message.state}>
            <h3 className="aigw-hidden">{message.role === "user" ? "You" : "Answer"}</h3>
            <p>{message.text || (message.state === "writing" ? "…" : "")}</p>
            {message.state === "stopped" && <small>Stopped.</small>}
            {message.state === "failed" && <small role="alert" className="aigw-failed">{message.error}</small>}
          </article>
        ))}
      </div>
      <p role="status" className="aigw-status">{status}</p>
      <form onSubmit={send}>
        <label className="aigw-hidden" htmlFor={`${id}-box`}>Message</label>
        <textarea
          id={`${id}-box`} ref={box} rows={2} value={draft} placeholder="Write a message" onChange={(event) => setDraft(event.target.value)}
          onKeyDown={(event) => { if (event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing) send(event); }}
        />
        {busy ? <button type="button" onClick={stop}>Stop</button> : <button type="submit" disabled={!draft.trim()}>Send</button>}
        {!busy && (last?.state === "failed" || last?.state === "stopped") && <button type="button" onClick={retry}>Retry</button>}
      </form>
    </section>
  );
}

/** @typedef {{role: "user" | "assistant", text: string, state: "done" | "writing" | "stopped" | "failed", error?: string}} Message */

const STYLE = `
.aigw { font: 1rem/1.5 var(--aigw-font, system-ui, sans-serif); color: var(--aigw-text, #1b1b1f); background: var(--aigw-surface, #fff);
  border: 1px solid var(--aigw-border, #d5d5dd); border-radius: var(--aigw-radius, 12px); display: flex; flex-direction: column;
  height: 100%; min-height: 20rem; padding: 1rem; gap: .75rem; box-sizing: border-box; }
.aigw header { display: flex; justify-content: space-between; align-items: center; gap: 1rem; flex-wrap: wrap; }
.aigw h2 { font-size: 1.1rem; margin: 0; }
.aigw fieldset { border: 0; padding: 0; margin: 0; display: flex; gap: 1rem; }
.aigw-log { flex: 1; overflow-y: auto; display: flex; flex-direction: column; gap: .5rem; }
.aigw article { max-width: 85%; padding: .5rem .75rem; border-radius: var(--aigw-radius, 12px); border: 1px solid var(--aigw-border, #d5d5dd); }
.aigw article p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.aigw-user { align-self: flex-end; background: var(--aigw-accent, #2f5bd7); color: var(--aigw-accent-text, #fff); }
.aigw-assistant { align-self: flex-start; }
.aigw small, .aigw-status { color: var(--aigw-muted, #5c5c66); font-size: .875rem; margin: 0; min-height: 1.2em; }
.aigw small.aigw-failed { color: var(--aigw-error, #b3261e); }
.aigw form { display: flex; gap: .5rem; align-items: flex-end; }
.aigw textarea { flex: 1; font: inherit; color: inherit; background: inherit; padding: .5rem; border: 1px solid var(--aigw-border, #d5d5dd); border-radius: 8px; resize: vertical; }
.aigw button { font: inherit; padding: .5rem 1rem; border: 0; border-radius: 8px; background: var(--aigw-accent, #2f5bd7); color: var(--aigw-accent-text, #fff); cursor: pointer; }
.aigw button:disabled { opacity: .5; cursor: default; }
.aigw :focus-visible { outline: 3px solid var(--aigw-accent, #2f5bd7); outline-offset: 2px; }
.aigw-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (prefers-reduced-motion: no-preference) { .aigw-log { scroll-behavior: smooth; } }
`;
