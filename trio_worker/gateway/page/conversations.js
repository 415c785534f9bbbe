// The conversations that this browser keeps, each under a key of its own in localStorage.

import { local } from "./storage.js";

const PREFIX = "trio-worker.conversation.";
const COUNT_MAX = 100;
const TOTAL_LIMIT_CHARS = 4_000_000; // Browsers allow about five million.
const TITLE_CHARS = 60;

/** What an answer can come to; `answering` is never kept. */
export const State = Object.freeze({
  ANSWERING: "answering",
  WHOLE: "whole",
  STOPPED: "stopped",
  BROKEN: "broken",
});

export const LEFT = "The page was left during the answer.";

/** A conversation without messages, with the settings of another. */
export function newConversation({ model = "", system = "", sampling = {} } = {}) {
  return { id: crypto.randomUUID?.() ?? randomId(), changed: Date.now(), model, system, sampling: { ...sampling }, messages: [] };
}

// randomUUID is there only for pages from this machine or over TLS.
const randomId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((each) => each.toString(16).padStart(2, "0")).join("");

export function titleOf(conversation) {
  const line = conversation.messages.find(({ role }) => role === "user")?.content.trim().split("\n")[0] ?? "";
  return line.length > TITLE_CHARS ? `${line.slice(0, TITLE_CHARS - 1).trimEnd()}…` : line || "New conversation";
}

/** What the server is asked with. Answers without a word are left out, and what then stands side by side is joined. */
export function requestOf({ model, system, sampling, messages }) {
  const said = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content } of messages) {
    if (!content) continue;
    if (said.at(-1)?.role === role) said.at(-1).content += `\n\n${content}`;
    else said.push({ role, content });
  }
  return { ...(model ? { model } : {}), messages: said, ...sampling };
}

/** A conversation as a file: its messages in OpenAI's form, and what is known of each answer. */
export function exported(conversation) {
  const { model, system, sampling, messages, changed } = keepable(conversation);
  const about = { title: titleOf(conversation), changed: new Date(changed).toISOString(), model, system, sampling };
  return JSON.stringify({ ...about, messages }, null, 2);
}

function keepable(conversation) {
  const messages = conversation.messages.map((message) =>
    message.state === State.ANSWERING
      ? { ...message, state: State.BROKEN, error: { message: LEFT, code: null } }
      : message,
  );
  return { ...conversation, messages };
}

export function load(id) {
  return parsed(local.getItem(PREFIX + id));
}

/** All that are kept, the last changed first. */
export function loadAll() {
  const all = keys().map((key) => parsed(local.getItem(key)));
  return all.filter(Boolean).sort((a, b) => b.changed - a.changed);
}

export function forget(id) {
  local.removeItem(PREFIX + id);
}

export const isOurs = (key) => key === null || key.startsWith(PREFIX);

/**
 * Keep a conversation; the oldest others go where there are too many or they take too much.
 *
 * Returns {kept, forgotten}: whether there was room at all, and the titles of those that went.
 */
export function keep(conversation) {
  const text = JSON.stringify(keepable(conversation));
  const key = PREFIX + conversation.id;
  const forgotten = [];
  if (!local.lasting || text.length > TOTAL_LIMIT_CHARS) return { kept: false, forgotten };
  const others = loadAll().filter(({ id }) => id !== conversation.id);
  const sizes = new Map(others.map(({ id }) => [id, local.getItem(PREFIX + id).length]));
  let total = text.length + [...sizes.values()].reduce((sum, size) => sum + size, 0);
  for (;;) {
    if (others.length < COUNT_MAX && total <= TOTAL_LIMIT_CHARS && stored(key, text)) return { kept: true, forgotten };
    const oldest = others.pop();
    if (!oldest) return { kept: false, forgotten };
    forget(oldest.id);
    total -= sizes.get(oldest.id);
    forgotten.push(titleOf(oldest));
  }
}

function stored(key, text) {
  try {
    local.setItem(key, text);
    return true;
  } catch {
    return false; // The browser's own limit comes first.
  }
}

function keys() {
  return local.keys().filter((key) => key.startsWith(PREFIX));
}

/** Null for what is not a conversation: others may have written there, or an older page. */
function parsed(text) {
  try {
    const { id, changed, model, system, sampling, messages } = JSON.parse(text);
    if (typeof id !== "string" || !messages.every(isMessage)) return null;
    const settings = { model: String(model ?? ""), system: String(system ?? ""), sampling: { ...sampling } };
    return { id, changed: Number(changed) || 0, ...settings, messages };
  } catch {
    return null;
  }
}

const isMessage = ({ role, content }) => (role === "user" || role === "assistant") && typeof content === "string";
