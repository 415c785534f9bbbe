// The page: what is shown, what is pressed, and which answers are under way.

import { Failure, askAnswer, askModels } from "./answering.js";
import { LEFT, State, exported, forget, isOurs, keep, load, loadAll } from "./conversations.js";
import { newConversation, requestOf, titleOf } from "./conversations.js";
import { draw } from "./markdown.js";
import { local, session } from "./storage.js";

const KEY = "trio-worker.key";
const LOOK = "trio-worker.look";
const SHOWN = "trio-worker.shown";
const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
const AT_END_PX = 40;

const at = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });
const day = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
const hour = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });

const runs = new Map(); // The answers under way, one a conversation: id → {conversation, controller}.
const views = new WeakMap(); // The nodes of each message that is shown.
let shown = newConversation();
let models = [];
let following = true; // Whether the reader is at the end, and wants to stay there.

function element(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

const button = (label, onclick, props = {}) => element("button", { type: "button", onclick, ...props }, label);

// --- asking --------------------------------------------------------------------------------

function send() {
  const content = at("prompt").value.trim();
  if (!content || runs.has(shown.id) || !settingsHold()) return;
  setPrompt("");
  focusPrompt();
  shown.messages.push({ role: "user", content });
  ask(shown);
}

/** Ask again from this message on: what came after it is gone. */
function askFrom(index, content) {
  if (runs.has(shown.id) || !settingsHold()) return;
  shown.messages.length = index;
  if (content !== undefined) shown.messages.push({ role: "user", content });
  ask(shown);
  focusPrompt();
}

async function ask(conversation) {
  const request = requestOf(conversation);
  const answer = { role: "assistant", content: "", reasoning: "", state: State.ANSWERING, model: conversation.model };
  const controller = new AbortController();
  conversation.messages.push(answer);
  runs.set(conversation.id, { conversation, controller });
  keepNow(conversation);
  following = true;
  showThread();
  at("progress").textContent = "Answering";
  try {
    await take(answer, request, controller.signal);
    answer.state = State.WHOLE;
  } catch (error) {
    if (error instanceof Failure) fail(answer, error);
    else if (controller.signal.aborted) answer.state = State.STOPPED;
    else throw error;
  } finally {
    if (answer.state === State.ANSWERING) answer.state = State.BROKEN;
    runs.delete(conversation.id);
    if (controller.signal.reason !== "deleted") keepNow(conversation);
    if (views.has(answer)) drawAnswer(answer);
    showBusy();
    at("progress").textContent = toldOf(answer).filter(Boolean).join(", ");
  }
}

/** Let the answer grow, piece by piece, and keep the times that matter. */
async function take(answer, request, signal) {
  const asked = performance.now();
  let first = null;
  for await (const piece of askAnswer(request, { key: session.getItem(KEY), signal })) {
    const now = performance.now();
    if (piece.content || piece.reasoning || piece.calls.length) {
      first ??= now;
      answer.content += piece.content;
      answer.reasoning += piece.reasoning;
      for (const each of piece.calls) addCall(answer, each);
      answer.firstMs = first - asked;
      answer.tookMs = now - first;
      drawSoon(answer);
    }
    answer.model = piece.model ?? answer.model;
    answer.finish = piece.finish ?? answer.finish;
    answer.tokens = piece.usage?.completion_tokens ?? answer.tokens;
  }
}

/** The page offers no tools, but shows what a model would call all the same. */
function addCall(answer, { index, name, arguments: more }) {
  answer.calls ??= [];
  answer.calls[index] ??= { name: "", arguments: "" };
  answer.calls[index].name += name;
  answer.calls[index].arguments += more;
}

function fail(answer, failure) {
  const { message, code, status, retryAfterS } = failure;
  answer.state = State.BROKEN;
  answer.error = { message, code, status, retryAfterS };
  if (status === 401) askForKey(message);
  if (status === 404 || status === 503) refreshModels();
}

function stop() {
  runs.get(shown.id)?.controller.abort();
}

// --- the thread ----------------------------------------------------------------------------

/** Let the page show the messages there are now; those that it shows already keep their nodes. */
function showThread() {
  const host = at("messages");
  const articles = shown.messages.map((message) => (views.get(message) ?? newView(message)).article);
  articles.forEach((article, index) => {
    if (host.children[index] !== article) host.insertBefore(article, host.children[index] ?? null);
  });
  while (host.children.length > articles.length) host.lastElementChild.remove();
  at("empty").hidden = articles.length > 0;
  document.title = articles.length ? `${titleOf(shown)} – trio-worker` : "trio-worker";
  showBusy();
  followEnd();
}

/** What can be pressed depends on whether an answer is under way. */
function showBusy() {
  const busy = runs.has(shown.id);
  const focused = document.activeElement;
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  for (const each of document.querySelectorAll(".asks")) each.disabled = busy;
  if (focused === at("send") || focused === at("stop")) focusPrompt();
  showList();
}

function newView(message) {
  const view = message.role === "user" ? questionView(message) : answerView(message);
  views.set(message, view);
  if (message.role === "assistant") drawAnswer(message);
  return view;
}

function questionView(message) {
  const text = element("p", { className: "text" }, message.content);
  const edit = button("Edit", () => editMessage(message), { className: "asks" });
  return { article: element("article", { className: "question", ariaLabel: "You" }, text, under(edit)) };
}

function answerView(answer) {
  const thoughts = element("div", { className: "prose" });
  const details = element("details", { className: "thoughts" }, element("summary", {}, "Thoughts"), thoughts);
  const body = element("div", { className: "prose", ariaLive: "polite" });
  const calls = element("pre", { className: "calls" });
  const error = element("div", { className: "error" });
  const figures = element("p", { className: "figures" });
  const copy = button("Copy", (event) => copyText(answer.content, event.currentTarget));
  const retry = button("Retry", () => askFrom(shown.messages.indexOf(answer)), { className: "asks" });
  const article = element("article", { className: "answer", ariaLabel: "Answer" }, details, body, calls, error, under(copy, retry, figures));
  return { article, details, thoughts, body, calls, error, figures, copy };
}

const under = (...children) => element("div", { className: "under" }, ...children);

function drawAnswer(answer) {
  const { article, details, thoughts, body, calls, error, figures, copy } = views.get(answer);
  article.dataset.state = answer.state;
  // Until then a screen reader would begin anew with every piece.
  body.ariaBusy = String(answer.state === State.ANSWERING);
  draw(body, answer.content);
  details.hidden = !answer.reasoning;
  draw(thoughts, answer.reasoning ?? "");
  calls.hidden = !answer.calls;
  calls.textContent = callsTold(answer).join("\n");
  error.hidden = !answer.error;
  error.replaceChildren(...(answer.error ? errorNodes(answer.error) : []));
  copy.disabled = !answer.content;
  figures.replaceChildren(...figuresOf(answer));
}

const callsTold = ({ calls }) => (calls ?? []).filter(Boolean).map((each) => `${each.name}(${each.arguments})`);

let due = null;

/** Once a frame, however many pieces come in it. */
function drawSoon(answer) {
  if (due === answer || !shown.messages.includes(answer)) return;
  due = answer;
  requestAnimationFrame(() => {
    due = null;
    drawAnswer(answer);
  });
}

function figuresOf(answer) {
  const [mark, ...figures] = toldOf(answer);
  const nodes = figures.filter(Boolean).map((figure) => element("span", {}, figure));
  if (mark) nodes.unshift(element("span", { className: "mark" }, mark));
  return nodes;
}

const TOLD_OF = { stop: "", length: "cut off at the token limit", tool_calls: "calls tools" };

/** What came of an answer, if it is not simply whole, and its figures. */
function toldOf({ state, finish, tokens, firstMs, tookMs, model, error }) {
  const marks = {
    [State.ANSWERING]: firstMs === undefined ? "waiting" : "answering",
    [State.WHOLE]: TOLD_OF[finish] ?? finish,
    [State.STOPPED]: "stopped",
    [State.BROKEN]: error && firstMs === undefined ? "failed" : "broken off",
  };
  return [
    marks[state],
    tokens === undefined ? "" : `${whole.format(tokens)} ${tokens === 1 ? "token" : "tokens"}`,
    tokens > 1 && tookMs > 0 ? `${rate((1000 * (tokens - 1)) / tookMs)} tokens/s` : "",
    firstMs === undefined ? "" : `first after ${seconds(firstMs)}`,
    model ?? "",
  ];
}

const rate = (value) => (value < 99.95 ? tenths : whole).format(value);
const seconds = (ms) => (ms < 999.5 ? `${whole.format(ms)} ms` : `${tenths.format(ms / 1000)} s`);

function errorNodes({ message, code, status, retryAfterS }) {
  const about = [code, status && `status ${status}`, retryAfterS && `try again in ${whole.format(retryAfterS)} s`];
  return [element("p", {}, message), element("p", { className: "code-of" }, about.filter(Boolean).join(" · "))];
}

function editMessage(message) {
  const { article } = views.get(message);
  const field = element("textarea", { value: message.content, ariaLabel: "Edit the message", rows: 1 });
  const cancel = () => {
    const { article: restored } = newView(message);
    article.replaceWith(restored);
    restored.querySelector("button").focus();
  };
  const save = () => {
    const content = field.value.trim();
    if (content) askFrom(shown.messages.indexOf(message), content);
  };
  field.addEventListener("input", () => mirror(field));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) cancel();
    if (!isSend(event)) return;
    event.preventDefault();
    save();
  });
  const note = element("span", { className: "soft" }, "What follows is asked anew.");
  article.classList.add("editing");
  const again = button("Ask again", save, { className: "asks" });
  article.replaceChildren(element("div", { className: "grow" }, field), under(again, button("Cancel", cancel), note));
  mirror(field);
  field.focus();
}

// --- following the end ---------------------------------------------------------------------

let last = { scrollTop: 0, scrollHeight: 0, clientHeight: 0 }; // As it was left here.

function followEnd() {
  const scroller = at("scroller");
  if (following) scroller.scrollTop = scroller.scrollHeight;
  const { scrollTop, scrollHeight, clientHeight } = scroller;
  last = { scrollTop, scrollHeight, clientHeight };
  at("latest").hidden = following;
}

at("scroller").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = at("scroller");
  // To be away from the end is not yet to have left it: what changes its size moves it, too.
  const resized = scrollHeight !== last.scrollHeight || clientHeight !== last.clientHeight;
  if (scrollHeight - scrollTop - clientHeight < AT_END_PX) following = true;
  else if (!resized && scrollTop < last.scrollTop) following = false;
  last.scrollTop = scrollTop;
  at("latest").hidden = following;
});
at("latest").addEventListener("click", () => {
  following = true;
  followEnd();
  focusPrompt();
});
const sizes = new ResizeObserver(followEnd);
sizes.observe(at("scroller"));
sizes.observe(at("thread"));

// --- conversations -------------------------------------------------------------------------

function keepNow(conversation) {
  conversation.changed = Date.now();
  const { kept, forgotten } = keep(conversation);
  if (!kept) notice("This browser cannot keep this conversation: export it before you leave.");
  const titles = forgotten.map((title) => `“${title}”`).join(", ");
  if (kept && titles) notice(`To make room, the oldest was forgotten: ${titles}.`);
  session.setItem(SHOWN, shown.id);
}

function showList() {
  const all = new Map(loadAll().map((each) => [each.id, each]));
  for (const { conversation } of runs.values()) all.set(conversation.id, conversation);
  const rows = [...all.values()].sort((a, b) => b.changed - a.changed).map((conversation) => {
    const row = button("", () => open(conversation.id), { className: "conversation" });
    row.append(element("span", { className: "title" }, titleOf(conversation)));
    row.append(element("span", { className: "when" }, whenOf(conversation)));
    if (conversation.id === shown.id) row.ariaCurrent = "true";
    return element("li", {}, row);
  });
  at("conversation-list").replaceChildren(...rows);
  const none = shown.messages.length === 0;
  at("export").disabled = none;
  at("delete").disabled = none;
}

function whenOf({ id, changed }) {
  if (runs.has(id)) return "answering";
  const date = new Date(changed);
  return (date.toDateString() === new Date().toDateString() ? hour : day).format(date);
}

function open(id) {
  const conversation = runs.get(id)?.conversation ?? load(id);
  if (conversation) show(conversation);
  closeShelves();
}

function show(conversation) {
  shown = conversation;
  following = true;
  session.setItem(SHOWN, shown.id);
  showSettings();
  showModels();
  showThread();
  focusPrompt();
}

function closeShelves() {
  for (const each of document.querySelectorAll(":popover-open")) each.hidePopover();
}

function remove() {
  const conversation = shown;
  runs.get(conversation.id)?.controller.abort("deleted");
  forget(conversation.id);
  closeShelves();
  show(newConversation(conversation));
  notice(`“${titleOf(conversation)}” was deleted.`, "Undo", () => {
    keepNow(conversation);
    show(conversation);
  });
}

function download() {
  const url = URL.createObjectURL(new Blob([exported(shown)], { type: "application/json" }));
  const name = titleOf(shown).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").toLowerCase();
  element("a", { href: url, download: `${name || "conversation"}.json` }).click();
  URL.revokeObjectURL(url);
}

at("new").addEventListener("click", () => {
  closeShelves();
  show(newConversation(shown));
});
at("export").addEventListener("click", download);
at("delete").addEventListener("click", remove);
window.addEventListener("storage", ({ key }) => {
  // Another tab has written. What is shown here follows, unless it is being answered.
  if (!isOurs(key)) return;
  const conversation = runs.has(shown.id) ? null : load(shown.id);
  if (conversation && conversation.changed !== shown.changed && !document.querySelector(".editing")) show(conversation);
  else showList();
});
window.addEventListener("pagehide", () => {
  for (const { conversation, controller } of runs.values()) {
    controller.abort(new Failure(LEFT));
    keep(conversation);
  }
});

// --- settings, models, key -----------------------------------------------------------------

function showSettings() {
  at("system").value = shown.system;
  for (const name of SAMPLING) at(name).value = shown.sampling[name] ?? "";
  markSettings();
}

function markSettings() {
  at("settings-open").classList.toggle("set", Boolean(shown.system.trim()) || Object.keys(shown.sampling).length > 0);
}

/** Whether what is set can be sent; where it cannot, the field is shown. */
function settingsHold() {
  if (at("settings").checkValidity()) return true;
  at("settings").showPopover();
  at("settings").reportValidity();
  return false;
}

at("settings").addEventListener("input", () => {
  shown.system = at("system").value;
  shown.sampling = Object.fromEntries(
    SAMPLING.filter((name) => at(name).value !== "").map((name) => [name, at(name).valueAsNumber]),
  );
  markSettings();
});
at("settings").addEventListener("change", () => shown.messages.length && keepNow(shown));
at("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  if (settingsHold()) at("settings").hidePopover();
});

async function refreshModels() {
  try {
    models = await askModels(session.getItem(KEY));
    at("key-form").hidden = true;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.status === 401) askForKey(error.message);
    else notice(error.message, "Try again", refreshModels);
    models = [];
  }
  showModels();
}

function showModels() {
  const names = models.map(({ id }) => id);
  if (shown.model && !names.includes(shown.model)) names.push(shown.model);
  if (!shown.model && models.length) shown.model = models[0].id;
  const isServed = (id) => !models.length || models.some((model) => model.id === id);
  const options = names.map((id) => new Option(isServed(id) ? id : `${id} (not served)`, id));
  if (!options.length) options.push(new Option("no model is served", ""));
  at("model").replaceChildren(...options);
  at("model").value = shown.model;
  at("model").title = shown.model;
  at("empty-model").textContent = shown.model || "the model";
}

at("model").addEventListener("change", () => {
  shown.model = at("model").value;
  at("empty-model").textContent = shown.model;
  if (shown.messages.length) keepNow(shown);
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") refreshModels();
});

function askForKey(why) {
  at("key-why").textContent = why;
  at("key-form").hidden = false;
  at("key").focus();
}

at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  session.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  at("key-form").hidden = true;
  await refreshModels();
  if (!at("key-form").hidden) return;
  focusPrompt();
  const last = shown.messages.at(-1);
  if (last?.error?.status === 401) askFrom(shown.messages.length - 1);
});

// --- small things --------------------------------------------------------------------------

function notice(text, action = "", onaction = null) {
  at("notice-text").textContent = text;
  at("notice-action").textContent = action;
  at("notice-action").hidden = !action;
  at("notice-action").onclick = () => {
    at("notice").hidden = true;
    onaction();
  };
  at("notice").hidden = false;
}

at("notice-close").addEventListener("click", () => {
  at("notice").hidden = true;
  focusPrompt();
});

async function copyText(text, pressed) {
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  // Without TLS, and not from this machine, there is no clipboard but the old way.
  pressed.textContent = done || copySelected(text) ? "Copied" : "Not copied";
  pressed.addEventListener("blur", () => (pressed.textContent = "Copy"), { once: true });
  pressed.addEventListener("pointerleave", () => (pressed.textContent = "Copy"), { once: true });
}

function copySelected(text) {
  const field = element("textarea", { value: text, className: "unseen" });
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

at("messages").addEventListener("click", ({ target }) => {
  if (target.matches(".copy")) copyText(target.closest(".code").querySelector("code").textContent, target);
});

const coarse = window.matchMedia("(pointer: coarse)");

/** Where a keyboard would rise over the page, nobody is sent to the field. */
function focusPrompt() {
  if (!coarse.matches) at("prompt").focus();
}

/** Enter alone, and not the one that ends a word of an input method. */
const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** A field grows with its text: the style sheet draws it once more, unseen, behind it. */
function mirror(field) {
  field.parentElement.dataset.text = field.value;
}

function setPrompt(text) {
  at("prompt").value = text;
  mirror(at("prompt"));
}

at("prompt").addEventListener("input", () => mirror(at("prompt")));
at("prompt").addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  send();
});
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  // What is open over the page is closed by the browser, and nothing else by the same key.
  if (event.key === "Escape" && !event.isComposing && !document.querySelector(":popover-open")) stop();
});

const darkSystem = window.matchMedia("(prefers-color-scheme: dark)");

function showLook() {
  const look = local.getItem(LOOK);
  if (look) document.documentElement.dataset.look = look;
  else delete document.documentElement.dataset.look;
  at("look").ariaPressed = String((look ?? (darkSystem.matches ? "dark" : "light")) === "dark");
}

at("look").addEventListener("click", () => {
  const wanted = at("look").ariaPressed === "true" ? "light" : "dark";
  // Back at what the system has, it is followed again.
  if (wanted === (darkSystem.matches ? "dark" : "light")) local.removeItem(LOOK);
  else local.setItem(LOOK, wanted);
  showLook();
});
darkSystem.addEventListener("change", showLook);

showLook();
show(load(session.getItem(SHOWN)) ?? shown);
refreshModels();
