"use strict";
// Draws what /events says. Nothing else is asked for, and nothing is kept but the charts' points.

const LOST_AFTER_MS = 3500;
const REOPEN_MS = 1000;
const WINDOW_S = 180;
const STEPS = ["trim_caches", "hold_low", "shrink_batch", "cap_tokens"];
const STAGES = ["waiting", "tokenising", "queued", "prefill", "decode", "resuming", "ended"];
const MEMBER_TONES = { accepting: "good", "not accepting": "warn", draining: "bad" };
const ENGINE_TONES = { ready: "good", loading: "warn", restarting: "bad", stopped: "bad" };

const at = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });

let samples = [];
let clockOffset = 0; // The page's clock less the worker's, in seconds.
let heardAt = 0;
let paused = false;
let source = null;
let charts = [];

const count = (value) => (value === null || value === undefined ? "–" : whole.format(value));
const millis = (value) => {
  if (value === null || value === undefined) return "–";
  return value < 999.5 ? `${whole.format(value)} ms` : `${tenths.format(value / 1000)} s`;
};
const megabytes = (value) => {
  if (!value) return "0 MB";
  return value < 10_000 ? `${whole.format(value)} MB` : `${tenths.format(value / 1024)} GB`;
};
const duration = (seconds) => {
  if (seconds < 60) return `${tenths.format(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
};

function text(id, value) {
  const node = at(id);
  if (node.textContent !== value) node.textContent = value;
}

function tone(node, value) {
  if (node.dataset.tone !== value) node.dataset.tone = value;
}

function figure(id, value, unit) {
  const node = at(id);
  const wanted = `${value}|${unit}`;
  if (node.dataset.shown === wanted) return;
  node.dataset.shown = wanted;
  const small = document.createElement("small");
  small.textContent = unit ? ` ${unit}` : "";
  node.replaceChildren(value, small);
}

function meter(node, share, says, how = "") {
  if (!node.firstChild) node.append(document.createElement("i"));
  node.firstChild.style.width = `${Math.min(100, Math.max(0, 100 * share))}%`;
  if (says) node.setAttribute("aria-label", says);
  tone(node, how);
}

function terms(id, rows) {
  const list = at(id);
  const wanted = rows.length * 2;
  while (list.children.length > wanted) list.lastChild.remove();
  while (list.children.length < wanted) {
    list.append(document.createElement(list.children.length % 2 ? "dd" : "dt"));
  }
  rows.forEach(([name, value, how], index) => {
    const [term, detail] = [list.children[2 * index], list.children[2 * index + 1]];
    if (term.textContent !== name) term.textContent = name;
    if (detail.textContent !== String(value)) detail.textContent = value;
    tone(detail, how || "");
  });
}

// --- the parts of the page ---------------------------------------------------------------

function showState({ live, ready, snapshot }) {
  const { worker, engine } = snapshot;
  text("worker-id", worker.id);
  text("model", engine.model);
  text("device", engine.device || "");
  text("version", `version ${worker.version}, up ${duration(worker.uptime_s)}`);
  const pill = at("state");
  if (!live.ok) [text("state", "not live"), tone(pill, "bad")];
  else if (worker.state === "ready") {
    text("state", ready.ok ? "ready" : "not accepting");
    tone(pill, ready.ok ? "good" : "warn");
  } else {
    text("state", worker.state);
    tone(pill, worker.state === "restarting" ? "bad" : "warn");
  }
  text("reason", live.ok ? (ready.ok ? "" : ready.reason) : live.reason);
  document.title = `${at("state").textContent} · ${worker.id} · trio-worker`;
}

function showFigures({ snapshot }) {
  const { batch, queue, requests, tokens } = snapshot;
  figure("tokens-per-second", tenths.format(tokens.per_second), "");
  text("tokens-total", `${count(tokens.generated)} out, ${count(tokens.prompt)} in`);
  figure("batch", count(batch.running), `of ${batch.max_batch_size}`);
  meter(
    at("batch-meter"), batch.running / batch.max_batch_size,
    `${batch.running} of ${batch.max_batch_size} batch slots are taken`,
  );
  text("batch-note", `mean ${tenths.format(batch.mean_batch_size)}, ${count(batch.preemptions)} preempted`);
  figure("queue", count(queue.depth), `of ${queue.max_depth}`);
  const fill = queue.depth / Math.max(queue.max_depth, 1);
  meter(
    at("queue-meter"), fill, `${queue.depth} of ${queue.max_depth} places are taken`,
    queue.is_full ? "bad" : fill > 0.75 ? "warn" : "",
  );
  text("queue-note", `wait p95 ${millis(requests.queue_wait_ms.p95)}, ${count(queue.promotions)} promoted, callers waiting: ${count(queue.callers)}`);
  const first = requests.time_to_first_token_ms;
  const gap = requests.inter_token_ms;
  figure("first", millis(first.p95), "");
  text("first-note", `p50 ${millis(first.p50)}, p99 ${millis(first.p99)}`);
  figure("gap", millis(gap.p95), "");
  text("gap-note", `p50 ${millis(gap.p50)}, p99 ${millis(gap.p99)}`);
  figure("completed", count(requests.completed), "");
  const failed = Object.entries(requests.by_outcome)
    .reduce((sum, [outcome, number]) => sum + (outcome === "ok" ? 0 : number), 0);
  text("completed-note", `${count(failed)} failed, ${count(requests.dropped)} dropped`);
}

function showMemory({ snapshot }) {
  const { resources } = snapshot;
  const { max_memory_mb: soft, critical_memory_mb: hard } = resources.limits;
  const scale = Math.max(hard * 1.05, resources.memory_mb);
  const node = at("memory-meter");
  const tones = { normal: "", soft: "warn", critical: "bad" };
  meter(
    node, resources.memory_mb / scale,
    `${megabytes(resources.memory_mb)} in use; the limits are ${megabytes(soft)} and ${megabytes(hard)}`,
    tones[resources.pressure],
  );
  while (node.children.length < 3) node.append(document.createElement("b"));
  node.children[1].style.left = `${(100 * soft) / scale}%`;
  node.children[2].style.left = `${(100 * hard) / scale}%`;
  terms("memory", [
    ["in use", megabytes(resources.memory_mb)],
    ["soft limit", megabytes(soft)],
    ["hard limit", megabytes(hard)],
    ["reserved for answers", megabytes(resources.reserved_mb)],
    ["free on the machine", megabytes(resources.available_mb)],
    ["pressure", resources.pressure, tones[resources.pressure]],
  ]);
  const list = at("steps");
  STEPS.forEach((step, index) => {
    const item = list.children[index] || list.appendChild(document.createElement("li"));
    const on = resources.steps.includes(step);
    const times = resources.degradations[step] || 0;
    const label = step.replace("_", " ") + (times ? ` ×${times}` : "");
    if (item.textContent !== label) item.textContent = label;
    item.dataset.on = on;
    item.setAttribute("aria-label", `${label}: ${on ? "in force" : "not in force"}`);
  });
}

function showQueue({ snapshot }) {
  const list = at("priorities");
  const levels = Object.entries(snapshot.queue.by_priority);
  const most = Math.max(1, ...levels.map(([, number]) => number));
  if (list.children.length !== levels.length * 3) {
    list.replaceChildren(...levels.flatMap(() => [
      document.createElement("dt"), document.createElement("dd"), document.createElement("dd"),
    ]));
    for (let index = 1; index < list.children.length; index += 3) list.children[index].className = "meter";
  }
  levels.forEach(([name, number], index) => {
    list.children[3 * index].textContent = name;
    meter(list.children[3 * index + 1], number / most, `${number} waiting`);
    list.children[3 * index + 2].textContent = count(number);
  });
  const outcomes = Object.entries(snapshot.requests.by_outcome).sort((a, b) => b[1] - a[1]);
  terms("outcomes", outcomes.length ? outcomes.map(([name, number]) => [name, count(number)]) : [["none yet", ""]]);
}

function showEngine({ snapshot }) {
  const { batch, engine, nats } = snapshot;
  terms("engine", [
    ["state", engine.state, ENGINE_TONES[engine.state]],
    ["restarts", count(engine.restarts), engine.restarts ? "warn" : ""],
    ["requests resumed", count(engine.resumed)],
    ["turns", count(batch.turns)],
    ["context", engine.context_length ? `${count(engine.context_length)} tokens` : "–"],
    ["cache per token", engine.cache_bytes_per_token ? `${count(engine.cache_bytes_per_token / 1024)} KiB` : "–"],
    ["allocated", megabytes(engine.memory_active_mb)],
    ["kept for reuse", megabytes(engine.memory_cache_mb)],
    ["process", engine.pid === null ? "–" : String(engine.pid)],
  ]);
  terms("nats", [
    ["connection", nats.connected ? "connected" : "down", nats.connected ? "good" : "bad"],
    ["server", nats.url],
    ["reconnects", count(nats.reconnects)],
    ["received", count(nats.received)],
    ["published", count(nats.published)],
    ["unpublished", `${count(nats.unpublished_bytes)} bytes`, nats.unpublished_bytes > 1e6 ? "warn" : ""],
    ["dropped", count(nats.dropped), nats.dropped ? "bad" : ""],
    ["slow consumer", count(nats.slow_consumers), nats.slow_consumers ? "bad" : ""],
  ]);
}

function showFleet({ fleet: members, snapshot }) {
  const { fleet, worker } = snapshot;
  const total = fleet.others + 1;
  text("fleet-count", total > members.length ? `${count(total)}, ${count(members.length)} shown` : count(total));
  const passedOn = Object.values(fleet.handed_on).reduce((sum, number) => sum + number, 0);
  text(
    "fleet-note",
    fleet.others || passedOn || fleet.taken_over
      ? `${count(passedOn)} handed on, ${count(fleet.taken_over)} taken over, ${count(fleet.returned)} came back`
      : "No other worker has been heard of.",
  );
  at("members").replaceChildren(...members.map((member) => memberRow(member, worker.id)));
}

function memberRow(member, ownId) {
  const row = document.createElement("tr");
  const cell = (value, className = "") => {
    const node = row.insertCell();
    node.className = className;
    node.append(value);
    return node;
  };
  cell(member.id === ownId ? `${member.id} (this one)` : member.id).title = member.id;
  cell(member.model).title = member.model;
  const running = member.in_flight - member.queued;
  const bar = document.createElement("span");
  bar.className = "meter";
  bar.setAttribute("aria-hidden", "true");
  meter(bar, running / member.slots, "");
  cell(bar).append(`${count(running)}/${count(member.slots)}`);
  cell(count(member.queued), "number");
  const says = member.leaving ? "draining" : member.accepting ? "accepting" : "not accepting";
  const pill = document.createElement("span");
  pill.className = "pill";
  pill.textContent = says;
  tone(pill, MEMBER_TONES[says]);
  cell(pill);
  cell(member.version);
  cell(duration(member.age_s), "number");
  return row;
}

function showRequests({ in_flight: requests, snapshot }) {
  const total = snapshot.requests.in_flight;
  const shown = total > requests.length ? `${count(total)}, the oldest ${requests.length} shown` : count(total);
  text("in-flight-count", shown);
  const body = at("in-flight");
  if (!requests.length) {
    const cell = document.createElement("td");
    cell.colSpan = 7;
    cell.className = "empty";
    cell.textContent = "No request is in flight.";
    const row = document.createElement("tr");
    row.append(cell);
    body.replaceChildren(row);
    return;
  }
  // The furthest first: a reader looks for what runs, then for what waits.
  const ordered = [...requests].sort(
    (a, b) => STAGES.indexOf(b.stage) - STAGES.indexOf(a.stage) || b.age_s - a.age_s,
  );
  body.replaceChildren(...ordered.map(requestRow));
}

function requestRow(request) {
  const row = document.createElement("tr");
  const cell = (value, className = "") => {
    const node = row.insertCell();
    node.className = className;
    node.append(value);
    return node;
  };
  cell(request.request_id).title = request.request_id;
  cell(request.stage, "stage").dataset.stage = request.stage;
  cell(request.priority);
  cell(duration(request.age_s), "number");
  const reading = request.stage === "prefill" && request.prefilled < request.prompt_tokens;
  cell(reading ? `${count(request.prefilled)}/${count(request.prompt_tokens)}` : count(request.prompt_tokens), "number");
  const bar = document.createElement("span");
  bar.className = "meter";
  bar.setAttribute("aria-hidden", "true");
  meter(bar, request.tokens / Math.max(request.max_tokens, 1), "");
  cell(bar).append(request.max_tokens ? `${count(request.tokens)}/${count(request.max_tokens)}` : "–");
  const notes = [];
  if (request.resumed) notes.push(`resumed ×${request.resumed}`);
  if (request.preempted) notes.push(`preempted ×${request.preempted}`);
  cell(notes.join(", "));
  return row;
}

// --- charts --------------------------------------------------------------------------------

const CHARTS = [
  { id: "chart-tokens", keys: ["tokens_per_second"], name: "Tokens per second" },
  { id: "chart-load", keys: ["running", "depth"], name: "Requests in the batch, and waiting" },
  { id: "chart-first", keys: ["first_p50", "first_p95"], name: "Time to first token in milliseconds, p50 and p95" },
  { id: "chart-gap", keys: ["gap_p50", "gap_p95"], name: "Milliseconds between two tokens, p50 and p95" },
];

function chartData(keys) {
  return [samples.map((each) => each.at + clockOffset), ...keys.map((key) => samples.map((each) => each[key]))];
}

function buildCharts() {
  const styles = getComputedStyle(document.documentElement);
  const colour = (name) => styles.getPropertyValue(name).trim();
  const axis = { stroke: colour("--soft"), font: "11px system-ui, sans-serif", grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false } };
  charts.forEach((chart) => chart.plot.destroy());
  charts = CHARTS.map(({ id, keys, name }) => {
    const host = at(id);
    host.setAttribute("role", "img");
    const strokes = [colour("--one"), colour("--two")];
    const plot = new uPlot({
      width: host.clientWidth, height: host.clientHeight,
      legend: { show: false },
      cursor: { show: false },
      padding: [8, 24, 0, 0],
      scales: {
        x: { time: true, range: () => [now() - WINDOW_S, now()] },
        y: { range: (_, low, high) => [0, Math.max(high || 0, 1) * 1.12] },
      },
      axes: [
        { ...axis, size: 24, space: 70, values: (_, ticks) => ticks.map(clock) },
        { ...axis, size: 46, space: 32 },
      ],
      series: [{}, ...keys.map((key, index) => ({
        stroke: strokes[index], width: 1.75, points: { show: false }, spanGaps: false,
        fill: keys.length === 1 ? `${strokes[index]}22` : undefined,
      }))],
    }, chartData(keys), host);
    return { plot, keys, host, name };
  });
}

const now = () => (samples.length ? samples[samples.length - 1].at + clockOffset : Date.now() / 1000);
const clock = (seconds) => new Date(seconds * 1000).toTimeString().slice(0, 8);

function drawCharts() {
  for (const { plot, keys, host, name } of charts) {
    plot.setData(chartData(keys));
    const last = samples[samples.length - 1];
    const values = keys.map((key) => (last && last[key] !== null ? tenths.format(last[key]) : "none yet"));
    host.setAttribute("aria-label", `${name}: now ${values.join(" and ")}`);
  }
}

function resizeCharts() {
  for (const { plot, host } of charts) {
    plot.setSize({ width: host.clientWidth, height: host.clientHeight });
  }
}

// --- the stream ----------------------------------------------------------------------------

function show(state) {
  showState(state);
  showFigures(state);
  showMemory(state);
  showQueue(state);
  showEngine(state);
  showFleet(state);
  showRequests(state);
  drawCharts();
}

function heard() {
  heardAt = performance.now();
  if (!paused) connection("live", "good");
}

function connection(says, how) {
  text("connection", says);
  text("silence", "");
  tone(at("connection"), how);
  document.body.classList.toggle("lost", how === "bad");
}

function open() {
  source = new EventSource("events");
  source.addEventListener("history", (event) => {
    const history = JSON.parse(event.data);
    clockOffset = Date.now() / 1000 - history.now;
    samples = history.samples;
    heard();
  });
  source.addEventListener("state", (event) => {
    heard();
    const state = JSON.parse(event.data);
    if (!samples.length || state.sample.at - samples[samples.length - 1].at > 0.2) samples.push(state.sample);
    while (samples.length && samples[0].at < state.sample.at - WINDOW_S) samples.shift();
    if (!paused) show(state);
  });
  source.addEventListener("error", () => {
    // A refused stream is not tried again by the browser itself.
    if (source.readyState === EventSource.CLOSED) setTimeout(open, REOPEN_MS);
  });
}

function watch() {
  const silent = performance.now() - heardAt;
  if (silent < LOST_AFTER_MS) return;
  connection("connection lost", "bad");
  if (heardAt) text("silence", `last heard ${whole.format(silent / 1000)} s ago`);
}

at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", paused);
  text("pause", paused ? "Resume" : "Pause");
  if (paused) connection("paused", "idle");
  else heardAt && connection("live", "good");
});
window.addEventListener("resize", resizeCharts);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", buildCharts);
buildCharts();
open();
setInterval(watch, 500);
