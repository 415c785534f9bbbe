// One question to the gateway, and its answer as it comes.

const LINE_LIMIT_CHARS = 2_000_000; // A longer event is not one of ours.
const ANSWER_LIMIT_CHARS = 1_000_000; // What a page can draw and a browser keep.
const CALLS_MAX = 128; // Of tools, in one answer.
const DETAIL_LIMIT_CHARS = 600; // Of an error that is not in OpenAI's form.

/** Why there is no answer, or no whole one: in the server's own words where it said any. */
export class Failure extends Error {
  constructor(message, { code = null, status = null, retryAfterS = null } = {}) {
    super(message);
    this.code = code;
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** The models that are served now. Throws a Failure. */
export async function askModels(key) {
  const response = await reach("v1/models", { headers: headersOf(key) });
  const body = await response.json().catch(() => null);
  if (!Array.isArray(body?.data)) throw new Failure("The list of models cannot be read.", { code: "unreadable" });
  return body.data.filter((model) => typeof model?.id === "string");
}

/**
 * The pieces of an answer: {content, reasoning, calls, finish, usage, model}, each or none of them.
 *
 * Ends by itself only after a whole answer. Throws a Failure where anything is missing of it, and
 * what `signal` was aborted with; either way the connection is given up.
 */
export async function* askAnswer(request, { key, signal }) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { ...headersOf(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
    throw await failureOf(response, "The server answered with something other than a stream.");
  }
  let finished = false;
  let length = 0;
  for await (const data of eventsOf(response.body, signal)) {
    if (data === "[DONE]") {
      if (finished) return;
      break;
    }
    const piece = pieceOf(data);
    finished ||= Boolean(piece.finish);
    length += piece.content.length + piece.reasoning.length;
    for (const call of piece.calls) length += call.name.length + call.arguments.length;
    if (length > ANSWER_LIMIT_CHARS) throw new Failure("The answer is too long for this page.", { code: "too_long" });
    yield piece;
  }
  throw new Failure("The stream ended before the answer did.", { code: "incomplete_stream" });
}

const headersOf = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function reach(path, init) {
  let response;
  try {
    response = await fetch(path, { ...init, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch {
    init.signal?.throwIfAborted();
    throw new Failure("The gateway cannot be reached.", { code: "unreachable" });
  }
  if (!response.ok) throw await failureOf(response, `The server answered with status ${response.status}.`);
  return response;
}

async function failureOf(response, otherwise) {
  const text = await response.text().catch(() => "");
  const retryAfterS = Number(response.headers.get("retry-after")) || null;
  const { message, code } = errorIn(text) ?? { message: text.trim().slice(0, DETAIL_LIMIT_CHARS) || otherwise, code: null };
  return new Failure(message, { code, status: response.status, retryAfterS });
}

function errorIn(text) {
  try {
    return saidBy(JSON.parse(text).error);
  } catch {
    return null;
  }
}

function saidBy(error) {
  if (!error) return null;
  const message = typeof error === "string" ? error : String(error.message ?? "The server named no reason.");
  return { message, code: String(error.code ?? error.type ?? "") || null };
}

function pieceOf(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Failure("An event of the stream cannot be read.", { code: "unreadable_event" });
  }
  const error = saidBy(chunk?.error);
  if (error) throw new Failure(error.message, { code: error.code });
  const choice = chunk?.choices?.[0];
  return {
    content: textOf(choice?.delta?.content),
    reasoning: textOf(choice?.delta?.reasoning_content),
    calls: callsOf(choice?.delta?.tool_calls),
    finish: choice?.finish_reason ?? null,
    usage: chunk?.usage ?? null,
    model: typeof chunk?.model === "string" ? chunk.model : null,
  };
}

/** Of each call that grows: which it is, and what is added to its name and its arguments. */
const callsOf = (deltas) =>
  (Array.isArray(deltas) ? deltas : [])
    .filter((delta) => delta?.index >= 0 && delta.index < CALLS_MAX)
    .map(({ index, function: called }) => ({ index, name: textOf(called?.name), arguments: textOf(called?.arguments) }));

const textOf = (value) => (typeof value === "string" ? value : "");

/** What the events of a stream carry; comments and other fields are passed over. */
async function* eventsOf(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await readFrom(reader, signal);
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      if (rest.length > LINE_LIMIT_CHARS) throw new Failure("An event of the stream has no end.", { code: "unreadable_event" });
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line || !data.length) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    // Of a stream that has ended or failed there is nothing left to give up.
    reader.cancel().catch(() => {});
  }
}

async function readFrom(reader, signal) {
  try {
    return await reader.read();
  } catch {
    signal.throwIfAborted();
    throw new Failure("The connection was lost in the middle of the answer.", { code: "connection_lost" });
  }
}
