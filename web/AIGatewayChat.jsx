/**
 * A chat with any model behind the AI gateway relay: text by SSE, or a realtime session by
 * WebSocket; the conversation continues across the switch. React 18 and 19.
 *
 * Copy this file (and AIGatewayChat.d.ts) to `src/components/`, and AIGatewayClient.js (and
 * AIGatewayClient.d.ts) to `src/utils/`; then `npm install marked`, the Markdown parser.
 *
 *   <AIGatewayChat model="gpt-5-mini" />
 *   <AIGatewayChat mode="realtime" theme="dark" examples={["What can you do?"]} />
 *
 * The look comes from CSS variables: --aigw-accent, --aigw-accent-text, --aigw-surface,
 * --aigw-raised, --aigw-text, --aigw-muted, --aigw-border, --aigw-link, --aigw-error,
 * --aigw-radius, --aigw-font. A value may be `light-dark(LIGHT, DARK)`.
 */
import { Lexer } from "marked";
import {
  memo, useCallback, useDeferredValue, useEffect, useId, useMemo, useRef, useState,
} from "react";
import {
  aiGateway, AIGatewayError, createAIGateway, createOpenAIRealtimeClient,
} from "../utils/AIGatewayClient";

const EXAMPLES = [
  "Explain streaming in two sentences.",
  "Write a Python function that reverses a string.",
  "Compare REST and WebSocket in a table.",
];

/** @param {import("./AIGatewayChat").AIGatewayChatProps} props */
export default function AIGatewayChat({
  title = "Chat", theme = "auto", greeting = "How can I help?", examples = EXAMPLES, ...options
}) {
  const { mode, messages, status, busy, ask, stop, retry, clear, changeMode } =
    useConversation(options);
  const [draft, setDraft] = useState("");
  const section = useRef(/** @type {HTMLElement | null} */ (null));
  const box = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  const id = useId();
  const { log, content, follow } = useStickyScroll();
  useKeyboardInset(section);

  // On a touch screen focus would open the keyboard over the answer.
  const focusBox = () => matchMedia("(pointer: fine)").matches && box.current?.focus();

  function send(text) {
    if (!text.trim() || busy) return;
    setDraft("");
    follow();
    ask(text.trim());
    focusBox();
  }

  function stopAndFocus() {
    if (!busy) return;
    stop();
    focusBox();
  }

  const submit = (event) => { event.preventDefault(); send(draft); };
  const last = messages[messages.length - 1];
  return (
    <section
      ref={section} className="aigw" data-theme={theme} aria-labelledby={`${id}-title`}
      onKeyDown={(event) => event.key === "Escape" && stopAndFocus()}
    >
      <style>{STYLE}</style>
      <header>
        <h2 id={`${id}-title`}>{title}</h2>
        {messages.length > 0 && (
          <button type="button" className="aigw-quiet" onClick={() => { clear(); focusBox(); }}>
            New chat
          </button>
        )}
        <fieldset>
          <legend className="aigw-hidden">Transport</legend>
          {["chat", "realtime"].map((each) => (
            <label key={each}>
              <input
                type="radio" name={`${id}-mode`} checked={mode === each}
                onChange={() => changeMode(each)}
              />
              <span>{each === "chat" ? "Chat" : "Realtime"}</span>
            </label>
          ))}
        </fieldset>
      </header>
      <div
        ref={log} className="aigw-log" role="log" aria-live="polite" aria-busy={busy} tabIndex={0}
        aria-label="Conversation"
      >
        <div ref={content} className="aigw-content">
          {messages.length === 0 && (
            <div className="aigw-greeting">
              <p>{greeting}</p>
              <ul>
                {examples.map((example) => (
                  <li key={example}>
                    <button type="button" onClick={() => send(example)}>{example}</button>
                  </li>
                ))}
              </ul>
            </div>
          )}
          {messages.map((message) => (
            <Message
              key={message.id} message={message}
              onRetry={message === last && !busy ? () => { retry(); focusBox(); } : undefined}
            />
          ))}
        </div>
      </div>
      <p role="status" className="aigw-status">{status}</p>
      <form onSubmit={submit}>
        <label className="aigw-hidden" htmlFor={`${id}-box`}>Message</label>
        <textarea
          id={`${id}-box`} ref={box} rows={1} value={draft} placeholder="Write a message"
          enterKeyHint="send" onChange={(event) => setDraft(event.target.value)}
          onKeyDown={(event) => {
            const enter = event.key === "Enter" && !event.nativeEvent.isComposing;
            if (enter && !event.shiftKey) submit(event);
          }}
        />
        {busy ? (
          <button type="button" onClick={stopAndFocus}>Stop</button>
        ) : (
          <button type="submit" disabled={!draft.trim()}>Send</button>
        )}
      </form>
    </section>
  );
}

/**
 * @typedef {{message: string, advice: string, requestId: string}} Failure
 * @typedef {"writing" | "done" | "stopped" | "failed"} MessageState
 * @typedef {{
 *   id: number, role: "user" | "assistant", text: string, state: MessageState, failure?: Failure
 * }} ChatMessage
 */

/** @param {{message: ChatMessage, onRetry?: (() => void) | undefined}} props */
function Message({ message, onRetry }) {
  const { role, text, state, failure } = message;
  const mine = role === "user";
  return (
    <article className={`aigw-${role}`} data-state={state}>
      <h3 className="aigw-hidden">{mine ? "You" : "Answer"}</h3>
      {mine ? <p>{text}</p> : <Markdown text={text} />}
      {state === "writing" && !text && (
        <p className="aigw-waiting"><span className="aigw-hidden">Waiting for the answer</span></p>
      )}
      {state === "stopped" && <p className="aigw-note">Stopped.</p>}
      {failure && (
        <div role="alert" className="aigw-failed">
          <p><strong>{failure.message}</strong></p>
          <p>{failure.advice}</p>
          {failure.requestId && <p className="aigw-note">Request id: {failure.requestId}</p>}
        </div>
      )}
      {!mine && state !== "writing" && (
        <div className="aigw-actions">
          {text && <CopyButton text={text} label="Copy answer" />}
          {onRetry && state !== "done" && (
            <button type="button" className="aigw-quiet aigw-retry" onClick={onRetry}>Retry</button>
          )}
        </div>
      )}
    </article>
  );
}

/** @param {{text: string, label: string}} props */
function CopyButton({ text, label }) {
  const [result, setResult] = useState("");
  useEffect(() => {
    if (!result) return undefined;
    const timer = setTimeout(() => setResult(""), 2000);
    return () => clearTimeout(timer);
  }, [result]);
  const copy = async () => setResult((await copyText(text)) ? "Copied" : "Copy failed");
  return (
    <button type="button" className="aigw-quiet" aria-label={result || label} onClick={copy}>
      {result || "Copy"}
    </button>
  );
}

/** Copy `text` to the clipboard; whether that worked. @param {string} text */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // The clipboard API exists on HTTPS and localhost only.
    const area = Object.assign(document.createElement("textarea"), { value: text, readOnly: true });
    area.style.cssText = "position: fixed; opacity: 0";
    document.body.append(area);
    const { activeElement } = document;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (activeElement instanceof HTMLElement) activeElement.focus();
    return done;
  }
}

/**
 * The messages, and the calls that write them. A message changes only while its state is `writing`,
 * so that a late delta cannot reach an answer that was stopped or has failed.
 * @param {import("./AIGatewayChat").AIGatewayChatProps} options
 */
function useConversation({
  mode: startMode = "chat", provider = "openai", model = "gpt-5-mini", realtimeModel, url, token,
  getTicket, instructions,
}) {
  const [mode, setMode] = useState(startMode);
  const [messages, setMessages] = useState(/** @type {ChatMessage[]} */ ([]));
  const [status, setStatus] = useState("");
  const abort = useRef(/** @type {AbortController | null} */ (null));
  const live = useRef(/** @type {Session | null} */ (null));
  const lastId = useRef(0);
  const busy = messages.some(({ state }) => state === "writing");

  /** @type {(id: number, update: (message: ChatMessage) => Partial<ChatMessage>) => void} */
  const change = useCallback((id, update) => {
    setMessages((all) => all.map((message) =>
      message.id === id && message.state === "writing"
        ? { ...message, ...update(message) }
        : message));
  }, []);
  const write = (id, delta) => change(id, ({ text }) => ({ text: text + delta }));
  const finish = (id, state) => change(id, () => ({ state }));
  const fail = (id, error) => change(id, () => ({ state: "failed", failure: failureOf(error) }));

  useEffect(() => () => { abort.current?.abort(); closeSession(live.current); }, []);

  async function chat(history, id, signal) {
    const gateway = url || token ? createAIGateway({ url, token }) : aiGateway;
    const system = instructions ? [{ role: "system", content: instructions }] : [];
    const turns = history.map(({ role, text }) => ({ role, content: text }));
    const data = { model, messages: [...system, ...turns], stream: true };
    const call = { provider, endpoint: "chat/completions", data, signal };
    let ended = false;
    for await (const event of gateway.stream(call)) {
      if (event.data === "[DONE]") { ended = true; break; }
      const { error, choices } = event.json();
      if (error) throw providerError(error);
      const { delta, finish_reason: reason } = choices?.[0] ?? {};
      if (delta?.content || delta?.refusal) write(id, delta.content || delta.refusal);
      ended ||= Boolean(reason); // not every provider sends [DONE]
    }
    if (!ended) throw new AIGatewayError("upstream_disconnected", "The answer ended early.");
    finish(id, "done");
  }

  function openSession() {
    /** @type {Session} */
    const session = { known: new Set(), answer: 0, stale: false, error: null };
    const show = (text) => { if (live.current === session) setStatus(text); };
    session.client = createOpenAIRealtimeClient({
      provider, url, token, getTicket, model: realtimeModel,
      onMessage: (event) => received(session, event),
      onReconnecting({ attempt }) {
        show(`Connection lost, reconnecting (attempt ${attempt})…`);
        const message = "The connection was lost while this answer was written.";
        fail(session.answer, { code: "connection_lost", message });
        // The restored connection is a new conversation at the provider.
        session.answer = 0;
        session.known.clear();
      },
      onReconnected: () => show("Connected again."),
      onError(error) {
        session.error = error;
        fail(session.answer, error);
      },
      onClose: () => show(session.error ? `Not connected. ${session.error.message}` : ""),
    });
    live.current = session;
    setStatus("Connecting…");
    session.ready = session.client.connect().then(() => show("Connected."));
    return session;
  }

  function received(session, event) {
    const { answer } = session;
    if (event.type === "response.output_text.delta") write(answer, event.delta);
    else if (event.type === "response.output_audio_transcript.delta") write(answer, event.delta);
    else if (event.type === "response.done") {
      const { status: outcome, status_details: details } = event.response;
      if (outcome === "failed") fail(answer, providerError(details?.error));
      else finish(answer, outcome === "cancelled" ? "stopped" : "done");
      // A response that was not asked for adds 0, which no message has: the session is replaced.
      session.known.add(answer);
      session.answer = 0;
    } else if (event.type === "error" && event.error?.code !== "response_cancel_not_active") {
      // What the provider's conversation holds now is unknown: the next message opens another.
      session.stale = true;
      if (answer) fail(answer, providerError(event.error));
      else setStatus(event.error?.message ?? "The provider reported an error.");
    }
  }

  /** The open session if its conversation is the start of `history`, else a new one. */
  function sessionFor(history) {
    const session = live.current;
    const ids = new Set(history.map(({ id }) => id));
    const fits = session && session.client.state !== "closed" && !session.stale &&
      !session.answer && [...session.known].every((id) => ids.has(id));
    if (fits) return session;
    closeSession(session);
    return openSession();
  }

  /** Send a session what it does not know of `history`, as conversation items. */
  async function synchronize(history) {
    const session = sessionFor(history);
    await session.ready;
    for (const { id, role, text } of history) {
      if (session.known.has(id)) continue;
      const content = [{ type: role === "user" ? "input_text" : "output_text", text }];
      const item = { type: "message", role, content };
      session.client.send({ type: "conversation.item.create", item });
      session.known.add(id);
    }
    return session;
  }

  async function realtime(history, id, signal) {
    const session = await synchronize(history);
    if (signal.aborted) return;
    session.answer = id;
    const response = { output_modalities: ["text"], ...(instructions && { instructions }) };
    session.client.send({ type: "response.create", response });
  }

  async function answer(history) {
    const id = ++lastId.current;
    const controller = new AbortController();
    abort.current = controller;
    setMessages([...history, { id, role: "assistant", text: "", state: "writing" }]);
    try {
      await (mode === "chat" ? chat : realtime)(withText(history), id, controller.signal);
    } catch (error) {
      fail(id, error);
    }
  }

  function stop() {
    abort.current?.abort();
    const session = live.current;
    if (session?.answer) session.client.send({ type: "response.cancel" });
    for (const { id } of messages) finish(id, "stopped");
  }

  function leave() {
    stop();
    closeSession(live.current);
    live.current = null;
    setStatus("");
  }

  return {
    mode, messages, status, busy, stop,
    ask(text) {
      answer([...messages, { id: ++lastId.current, role: "user", text, state: "done" }]);
    },
    retry() {
      const asked = messages.map(({ role }) => role).lastIndexOf("user");
      answer(messages.slice(0, asked + 1));
    },
    clear() {
      leave();
      setMessages([]);
    },
    changeMode(next) {
      leave();
      setMode(next);
      // A session that cannot be opened is reported in the status, and again by the next message.
      if (next === "realtime") synchronize(withText(messages)).catch(() => {});
    },
  };
}

/**
 * A realtime session: the ids of the messages that its conversation has, and of the answer that it
 * is writing. It is stale if its conversation may differ from what is shown.
 * @typedef {{
 *   known: Set<number>, answer: number, stale: boolean, error: Error | null,
 *   client?: any, ready?: Promise<void>
 * }} Session
 */

/** @param {Session | null} session */
function closeSession(session) {
  if (!session) return;
  session.answer = 0;
  session.client.disconnect();
}

/** What a model gets: an answer without text says nothing, and some providers refuse it. */
const withText = (messages) => messages.filter(({ text }) => text);

/** @param {{message?: string, code?: string | null} | null | undefined} error */
const providerError = (error) =>
  new AIGatewayError(error?.code ?? "provider_error", error?.message ?? "The answer failed.", {
    source: "provider",
  });

const RELAY_LOG = "If it happens again, look for the request in the relay's log.";
const ADVICE = {
  connect_failed: "Check that the relay runs, and that gateway.yaml allows this page's origin.",
  connection_lost: "Retry when the connection is restored.",
  origin_not_allowed: "List this page's origin under cors.origins in gateway.yaml.",
  overloaded: "The relay is at its limit. Wait a moment, then retry.",
  provider_not_configured: "Set the provider's key in the relay's .env, and reload the relay.",
  rate_limited: "A limit of the relay is reached. Wait a moment, then retry.",
  relay_unreachable: "Check that the relay runs, and that this page can reach it, then retry.",
  restarting: "The relay is restarting. Retry in a moment.",
  unknown_provider: "Choose a provider that gateway.yaml has.",
  upstream_timeout: "The provider did not answer in time. Retry, or choose another model.",
  upstream_unreachable: "The relay cannot reach the provider. Check its network, then retry.",
};

/** What the user can do about an error. @param {any} error */
function adviceFor({ code, status }) {
  if (Object.hasOwn(ADVICE, code)) return ADVICE[code];
  if (status === 401 || status === 403) return "Check the token and the provider's key.";
  if (status === 404) return "Check the names of the provider and of the model.";
  if (status === 429) return "The provider's limit is reached. Wait a moment, then retry.";
  if (status >= 400 && status < 500) return "Change the message or the model, then retry.";
  return `Retry. ${RELAY_LOG}`;
}

/** @param {any} error @returns {Failure} */
function failureOf(error) {
  const message = error.message || "The answer failed.";
  return { message, advice: adviceFor(error), requestId: error.requestId ?? "" };
}

/** Keep the end of the log in view while it grows, unless the user has scrolled up. */
function useStickyScroll() {
  const log = useRef(/** @type {HTMLDivElement | null} */ (null));
  const content = useRef(/** @type {HTMLDivElement | null} */ (null));
  const follows = useRef(true);
  useEffect(() => {
    const [outer, inner] = [log.current, content.current];
    if (!outer || !inner) return undefined;
    const scrolled = () => {
      follows.current = outer.scrollHeight - outer.scrollTop - outer.clientHeight < 40;
    };
    const observer = new ResizeObserver(() => {
      if (follows.current) outer.scrollTop = outer.scrollHeight;
    });
    observer.observe(inner);
    observer.observe(outer);
    outer.addEventListener("scroll", scrolled);
    return () => { observer.disconnect(); outer.removeEventListener("scroll", scrolled); };
  }, []);
  return { log, content, follow: () => { follows.current = true; } };
}

/**
 * Set --aigw-keyboard to the height of the part that an on-screen keyboard covers: iOS does not
 * resize the page for it.
 */
function useKeyboardInset(section) {
  useEffect(() => {
    const viewport = window.visualViewport;
    if (!viewport) return undefined;
    const measure = () => {
      const { bottom } = section.current.getBoundingClientRect();
      const covered = viewport.scale > 1 ? 0 : bottom - viewport.offsetTop - viewport.height;
      section.current.style.setProperty("--aigw-keyboard", `${Math.max(0, Math.round(covered))}px`);
    };
    const events = ["resize", "scroll"];
    for (const event of events) viewport.addEventListener(event, measure);
    return () => { for (const event of events) viewport.removeEventListener(event, measure); };
  }, [section]);
}

// What is larger is shown as plain text: parsing takes quadratic time in the worst case.
const MAX_MARKDOWN_CHARS = 50_000;
const MAX_INLINE_CHARS = 4_000;
const MAX_DEPTH = 12;
const DEEP_QUOTE = /^(?:[ \t]*>){13}/m;

/**
 * Markdown as React elements: no HTML is ever parsed, tags in it are shown as text, links go to
 * http, https and mailto only, and images are links, because loading one could send what is in its
 * URL to a stranger.
 */
const Markdown = memo(function Markdown(/** @type {{text: string}} */ { text }) {
  // While deltas arrive fast, React skips what it has no time to show.
  const shown = useDeferredValue(text);
  const elements = useMemo(() => elementsOf(shown), [shown]);
  return <div className="aigw-markdown">{elements}</div>;
});

function elementsOf(text) {
  const plain = <p>{text}</p>;
  if (text.length > MAX_MARKDOWN_CHARS || DEEP_QUOTE.test(text)) return plain;
  try {
    return renderAll(tokensOf(text), 0);
  } catch {
    return plain; // nested deeper than the parser's stack
  }
}

/** What `marked.lexer` does, within limits. @param {string} text */
function tokensOf(text) {
  const lexer = new Lexer({ gfm: true, breaks: true });
  const blocks = lexer.blockTokens(text.replace(/\r\n?/g, "\n"));
  for (const { src, tokens } of lexer.inlineQueue) {
    if (src.length <= MAX_INLINE_CHARS) lexer.inlineTokens(src, tokens);
    else tokens.push({ type: "text", raw: src, text: src });
  }
  return blocks;
}

const renderAll = (tokens, depth) => tokens.map((token, key) => render(token, key, depth + 1));

/** One token of marked's lexer. @param {any} token @param {number} key @param {number} depth */
function render(token, key, depth) {
  if (depth > MAX_DEPTH) return token.raw;
  const { tokens, text } = token;
  const inner = () => (tokens ? renderAll(tokens, depth) : decodeReferences(text));
  switch (token.type) {
    case "space": case "def": case "checkbox": return null;
    case "paragraph": return <p key={key}>{inner()}</p>;
    case "heading": {
      const Heading = /** @type {"h4"} */ (`h${Math.min(6, token.depth + 3)}`);
      return <Heading key={key}>{inner()}</Heading>;
    }
    case "code": return <Code key={key} text={token.text} language={token.lang} />;
    case "blockquote": return <blockquote key={key}>{inner()}</blockquote>;
    case "list": return <List key={key} token={token} depth={depth} />;
    case "table": return <Table key={key} token={token} depth={depth} />;
    case "hr": return <hr key={key} />;
    case "strong": return <strong key={key}>{inner()}</strong>;
    case "em": return <em key={key}>{inner()}</em>;
    case "del": return <del key={key}>{inner()}</del>;
    case "codespan": return <code key={key}>{token.text}</code>;
    case "br": return <br key={key} />;
    case "escape": return token.text;
    case "text": return <span key={key}>{inner()}</span>;
    case "link": return <Link key={key} href={token.href}>{inner()}</Link>;
    case "image": return <Link key={key} href={token.href}>{token.text || "Image"}</Link>;
    case "html":
      if (token.block) return <p key={key}>{token.raw}</p>;
      return /^<br\s*\/?>$/i.test(token.raw) ? <br key={key} /> : token.raw;
    default: return token.raw;
  }
}

function Link({ href, children }) {
  const target = decodeReferences(href);
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return <span>{children}</span>;
  return <a href={target} target="_blank" rel="noopener noreferrer nofollow">{children}</a>;
}

function List({ token, depth }) {
  const items = token.items.map((item, key) => (
    <li key={key}>
      {item.task && <input type="checkbox" checked={item.checked} disabled aria-label="Done" />}
      {renderAll(item.tokens, depth)}
    </li>
  ));
  return token.ordered ? <ol start={token.start || 1}>{items}</ol> : <ul>{items}</ul>;
}

function Table({ token, depth }) {
  const cell = (Cell) => ({ tokens, align }, key) => (
    <Cell key={key} style={align ? { textAlign: align } : undefined}>
      {renderAll(tokens, depth)}
    </Cell>
  );
  return (
    <div className="aigw-table" role="group" aria-label="Table" tabIndex={0}>
      <table>
        <thead><tr>{token.header.map(cell("th"))}</tr></thead>
        <tbody>{token.rows.map((row, key) => <tr key={key}>{row.map(cell("td"))}</tr>)}</tbody>
      </table>
    </div>
  );
}

function Code({ text, language }) {
  const name = (language ?? "").split(/\s/)[0].slice(0, 20);
  return (
    <div className="aigw-code">
      <div><span>{name}</span><CopyButton text={text} label="Copy code" /></div>
      <pre tabIndex={0} role="group" aria-label="Code"><code>{text}</code></pre>
    </div>
  );
}

const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©" };

/** The lexer leaves character references in text as they are. @param {string} text */
const decodeReferences = (text) =>
  text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w{2,6}));/gi, (whole, decimal, hex, name) => {
    if (name) return Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : whole;
    const point = decimal ? Number(decimal) : Number.parseInt(hex, 16);
    return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : "\ufffd";
  });

const STYLE = `
.aigw {
  color-scheme: light dark;
  --text: var(--aigw-text, light-dark(#1b1b1f, #ececf1));
  --muted: var(--aigw-muted, light-dark(#5c5c66, #a9a9b5));
  --surface: var(--aigw-surface, light-dark(#fff, #17171b));
  --raised: var(--aigw-raised, light-dark(#f3f4f8, #24242b));
  --border: var(--aigw-border, light-dark(#d5d5dd, #3a3a44));
  --accent: var(--aigw-accent, light-dark(#2f5bd7, #3a62d8));
  --accent-text: var(--aigw-accent-text, #fff);
  --link: var(--aigw-link, light-dark(#2450c8, #a3bcff));
  --error: var(--aigw-error, light-dark(#b3261e, #ffb4ab));
  --radius: var(--aigw-radius, 12px);
  font: 1rem/1.5 var(--aigw-font, system-ui, sans-serif);
  color: var(--text); background: var(--surface);
  display: flex; flex-direction: column; gap: .75rem; box-sizing: border-box;
  height: 100%; min-height: min(20rem, 100dvh); min-width: 0; padding: .75rem 1rem;
  padding-bottom: calc(max(.75rem, env(safe-area-inset-bottom)) + var(--aigw-keyboard, 0px));
  padding-left: max(1rem, env(safe-area-inset-left));
  padding-right: max(1rem, env(safe-area-inset-right));
  text-size-adjust: 100%; -webkit-text-size-adjust: 100%;
}
.aigw[data-theme=light] { color-scheme: light; }
.aigw[data-theme=dark] { color-scheme: dark; }
.aigw *, .aigw *::before { box-sizing: border-box; }
.aigw p { margin: 0; overflow-wrap: anywhere; }
.aigw header { display: flex; align-items: center; gap: .75rem; }
.aigw h2 {
  font-size: 1.1rem; margin: 0 auto 0 0; min-width: 0;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
}
.aigw button {
  font: inherit; font-weight: 600; min-height: 2.75rem; padding: .5rem 1rem; border: 0;
  border-radius: var(--radius); background: var(--accent); color: var(--accent-text);
  cursor: pointer;
}
.aigw button:disabled {
  background: var(--raised); color: var(--muted); cursor: default;
}
.aigw button.aigw-quiet {
  background: none; color: var(--muted); font-weight: 400; font-size: .875rem;
  min-height: 2rem; padding: .25rem .5rem; white-space: nowrap;
}
.aigw button.aigw-retry {
  margin: .25rem .5rem; border: 1px solid var(--border); color: var(--text);
}
.aigw button.aigw-quiet:hover { background: var(--raised); color: var(--text); }
.aigw fieldset {
  display: flex; border: 0; margin: 0; padding: 3px;
  background: var(--raised); border-radius: var(--radius);
}
.aigw fieldset label { position: relative; cursor: pointer; }
.aigw fieldset input { position: absolute; inset: 0; margin: 0; opacity: 0; cursor: pointer; }
.aigw fieldset span {
  display: block; padding: .3rem .75rem; color: var(--muted);
  border-radius: calc(var(--radius) - 3px);
}
.aigw fieldset input:checked + span {
  background: var(--surface); color: var(--text); box-shadow: 0 1px 2px rgb(0 0 0 / .2);
}
.aigw :focus-visible, .aigw fieldset input:focus-visible + span {
  outline: 2px solid var(--link); outline-offset: 2px;
}
.aigw-log { flex: 1; min-height: 0; overflow: hidden auto; overscroll-behavior: contain; }
.aigw .aigw-log:focus-visible { outline-offset: -2px; border-radius: var(--radius); }
.aigw-content {
  display: flex; flex-direction: column; gap: 1.25rem; min-height: 100%;
  max-width: 46rem; margin: 0 auto; padding: .25rem;
}
.aigw-greeting { margin: auto; padding: 1rem 0; text-align: center; width: 100%; }
.aigw-greeting > p { font-size: 1.5rem; font-weight: 600; margin-bottom: 1.25rem; }
.aigw-greeting ul {
  list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr));
}
.aigw-greeting li { display: grid; }
.aigw .aigw-greeting button {
  background: none; color: var(--text); font-weight: 400; text-align: left;
  border: 1px solid var(--border); padding: .75rem 1rem;
}
.aigw .aigw-greeting button:hover { background: var(--raised); }
.aigw article { min-width: 0; }
.aigw-user {
  align-self: flex-end; max-width: 85%; padding: .5rem .875rem; white-space: pre-wrap;
  border-radius: var(--radius); background: var(--accent); color: var(--accent-text);
}
.aigw-note { color: var(--muted); font-size: .875rem; }
.aigw-failed {
  margin-top: .5rem; padding: .625rem .875rem; color: var(--error);
  border: 1px solid currentColor; border-radius: var(--radius);
}
.aigw-failed p + p { color: var(--text); }
.aigw-actions { display: flex; gap: .25rem; margin: .25rem 0 0 -.5rem; }
.aigw-waiting::before {
  content: ""; display: block; width: .625rem; height: .625rem; margin: .5rem 0;
  border-radius: 50%; background: var(--muted);
}
.aigw-status { max-width: 46rem; width: 100%; color: var(--muted); font-size: .875rem; }
.aigw .aigw-status { margin: 0 auto; padding: 0 .25rem; }
.aigw-status:empty { display: none; }
.aigw form {
  display: flex; gap: .5rem; align-items: flex-end; width: 100%; max-width: 46rem;
  margin: 0 auto;
}
.aigw textarea {
  flex: 1; min-width: 0; min-height: 2.75rem; max-height: 10rem; field-sizing: content;
  font: inherit; font-size: max(1rem, 16px); color: inherit; background: var(--raised);
  padding: .55rem .875rem; border: 1px solid var(--border); border-radius: var(--radius);
  resize: none;
}
.aigw textarea::placeholder { color: var(--muted); opacity: 1; }
.aigw-markdown { display: flex; flex-direction: column; gap: .75rem; overflow-wrap: anywhere; }
.aigw-markdown > * { margin: 0; min-width: 0; }
.aigw-markdown :is(h4, h5, h6) { font-size: 1.05rem; line-height: 1.3; }
.aigw-markdown :is(ul, ol) { margin: 0; padding-left: 1.5rem; }
.aigw-markdown li + li { margin-top: .25rem; }
.aigw-markdown li > input { margin: 0 .5rem 0 0; }
.aigw-markdown blockquote {
  padding-left: .875rem; border-left: 3px solid var(--border); color: var(--muted);
}
.aigw-markdown hr { width: 100%; border: 0; border-top: 1px solid var(--border); }
.aigw-markdown a { color: var(--link); }
.aigw-markdown code { font: .875em/1.5 ui-monospace, monospace; }
.aigw-markdown :not(pre) > code {
  background: var(--raised); padding: .1em .35em; border-radius: 5px;
}
.aigw-code { background: var(--raised); border-radius: var(--radius); overflow: hidden; }
.aigw-code > div {
  display: flex; justify-content: space-between; align-items: center;
  padding: .125rem .375rem .125rem .875rem; color: var(--muted); font-size: .875rem;
  border-bottom: 1px solid var(--border);
}
.aigw-code pre { margin: 0; padding: .75rem .875rem; overflow-x: auto; }
.aigw .aigw-code pre:focus-visible { outline-offset: -2px; border-radius: var(--radius); }
.aigw-table { overflow-x: auto; }
.aigw-table table { border-collapse: collapse; overflow-wrap: normal; }
.aigw-table :is(th, td) {
  border: 1px solid var(--border); padding: .375rem .75rem; text-align: left;
}
.aigw-table th { background: var(--raised); }
.aigw-hidden {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap;
}
@media (max-width: 30rem) {
  .aigw h2 { font-size: 1rem; }
  .aigw header { gap: .375rem; }
}
@media (pointer: coarse) {
  .aigw button.aigw-quiet { min-height: 2.75rem; padding: .25rem .75rem; }
  .aigw fieldset span { padding: .5rem .75rem; }
}
@media (prefers-reduced-motion: no-preference) {
  .aigw-waiting::before { animation: aigw-pulse 1.2s ease-in-out infinite; }
  @keyframes aigw-pulse { 50% { opacity: .25; transform: scale(.7); } }
}
`;
