// The page: takes events in, and draws them. Data from outside becomes text, never markup.

import { Charts } from "./charts.js";
import { Commands, firstRequest } from "./commands.js";
import { make, set } from "./elements.js";
import { follow, key } from "./feed.js";
import { Happened } from "./happened.js";
import { LearnerPanel, short } from "./learner.js";
import { History, ORDERS, clock, count, health, kv, percent, roleOf, seconds, summary } from "./model.js";
import { RequestList } from "./requests.js";

const CAPACITY = 1800; // samples remembered: half an hour
const LATE_S = 3; // data older than this is called stale

const $ = (id) => document.getElementById(id);

// --- state ---

const NAMES = [
  "ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "tpot_p90", "tpot_p99", "gap_p50", "gap_p90", "gap_p99", "kv_max", "kv_mean", "kv_min", "kv_peak",
  "running", "queued", "waiting", "suspended", "error_mean", "error_p90", "new_moves", "new_preemptions",
];
const history = new History(NAMES, CAPACITY);
const happened = new Happened(document.querySelector("#moves ol"));
let snapshot = null;
let now = null; // its summary
let receivedAt = -Infinity; // by performance.now
const seen = { moves: 0, preemptions: 0 }; // since the page was opened
const counted = { moves: 0 }; // of them, before the newest sample
let paused = false;
let frameRequested = false;

// --- what comes in ---

function take(event, data) {
  if (event === "moves") {
    const added = happened.takeMoves(data);
    if (snapshot) seen.moves += added;
    return;
  }
  if (event === "changes") happened.takeChanges(data);
  if (event === "learners") learner.take(data);
  if (event !== "snapshot") return;
  const before = now;
  snapshot = data;
  now = summary(data);
  receivedAt = performance.now();
  // An instance that restarts counts from zero again.
  const preempted = before ? Math.max(0, now.preemptions - before.preemptions) : 0;
  seen.preemptions += preempted;
  history.push(data.now, { ...now, new_moves: seen.moves - counted.moves, new_preemptions: preempted });
  counted.moves = seen.moves;
  if (!paused && !frameRequested) requestAnimationFrame(draw);
  frameRequested ||= !paused;
  showConnection();
}

// --- tiles ---

const tile = (title, hint) => {
  const value = make("dd", "value");
  const note = make("dd", "note dim");
  const box = make("div", "tile", make("dt", "", title), value, note);
  box.title = hint;
  $("tiles").append(box);
  return (text, below, alarm = false) => {
    set(value, text);
    set(note, below);
    value.classList.toggle("alarm", alarm);
  };
};

const tiles = {
  running: tile("Running", "Requests that decode now; below, those that prefill, wait for admission, wait in the queue of an instance, or are suspended"),
  kv: tile("KV in use", "Share of all decode instances' KV blocks in use"),
  peak: tile("KV, fullest", "The fullest decode instance, now and at its predicted peak"),
  ttft: tile("TTFT", "Arrival to first token, of the last minute"),
  tpot: tile("TPOT", "Time per output token, of the requests that ended in the last minute"),
  gap: tile("Longest gap", "Longest time between two tokens, of the requests that ended in the last minute"),
  rate: tile("Decode rate", "Running requests over step time, summed over the instances"),
  moves: tile("Moves", "Moves since this page was opened, and under way"),
  preemptions: tile("Preemptions", "Since this page was opened, and since the instances started"),
  error: tile("Prediction error", "Mean absolute error of the predicted remaining tokens, of the last minute"),
};

function drawTiles() {
  const { ttft_s: ttft, tpot_s: tpot, longest_gap_s: gap, prediction_error_tokens: error } = snapshot.recent;
  const outside = [["prefill", now.prefill], ["waiting", now.waiting], ["queued", now.queued], ["suspended", now.suspended]];
  const parts = outside.filter(([, value]) => value).map(([name, value]) => `${count(value)} ${name}`);
  tiles.running(count(now.running), parts.join(" · ") || "none waiting");
  tiles.kv(percent(now.kv_mean), `of ${count(decode().reduce((all, one) => all + (one.capacity_tokens ?? 0), 0))} tokens`);
  const peak = Number.isNaN(now.kv_peak) ? "no prediction" : `predicted peak ${percent(now.kv_peak)}`;
  tiles.peak(percent(now.kv_max), peak, now.kv_peak > 1);
  tiles.ttft(seconds(ttft.p50), `p90 ${seconds(ttft.p90)} · p99 ${seconds(ttft.p99)}`);
  tiles.tpot(seconds(tpot.p50), `p90 ${seconds(tpot.p90)} · p99 ${seconds(tpot.p99)}`);
  tiles.gap(seconds(gap.p50), `p90 ${seconds(gap.p90)} · p99 ${seconds(gap.p99)}`);
  tiles.rate(count(now.tokens_per_s), "tokens/s");
  tiles.moves(count(seen.moves), `${count(now.moving)} under way`);
  tiles.preemptions(count(seen.preemptions), `${count(now.preemptions)} in all`, seen.preemptions > 0);
  const bias = error.bias === null ? "none ended" : `${error.bias > 0 ? "+" : ""}${count(error.bias)} bias · ${count(error.count)} scored`;
  tiles.error(count(error.mean_absolute), bias);
}

const decode = () => snapshot.instances.filter((one) => one.role !== "prefill");

// --- instances ---

const GLYPHS = { ready: "●", draining: "◐", leaving: "◐", "not ready": "✕" };
const lines = new Map();

function line(name) {
  const glyph = make("span", "glyph");
  const label = make("span", "name");
  const model = make("span", "model dim");
  const button = make("button", "plain", glyph, label, model);
  button.type = "button";
  const used = make("i", "used");
  const growth = make("i", "growth");
  const bar = make("div", "bar", used, growth);
  const cells = {};
  const row = make("tr", "", make("th", "", button), make("td", "bar-column", bar));
  row.firstChild.scope = "row";
  for (const column of ["kv", "peak", "running", "waiting", "step", "preemptions"]) {
    cells[column] = make("td", `number ${column === "step" || column === "preemptions" ? "wide" : ""}`);
    row.append(cells[column]);
  }
  const more = make("button", "plain", "⋯");
  more.type = "button";
  more.title = `Drain or undrain ${name}`;
  more.setAttribute("aria-label", more.title);
  more.addEventListener("click", () => {
    const one = snapshot.instances.find((each) => each.name === name);
    if (one) commands.instance(one);
  });
  row.append(make("td", "more", more));
  button.addEventListener("click", () => {
    $("filter").value = $("filter").value === name ? "" : name;
    $("filter").dispatchEvent(new Event("input"));
  });
  return { row, button, glyph, label, model, bar, used, growth, cells };
}

function drawInstances() {
  const body = document.querySelector("#instances tbody");
  const names = new Set(snapshot.instances.map((one) => one.url));
  for (const [name, { row }] of lines) {
    if (!names.has(name)) {
      row.remove();
      lines.delete(name);
    }
  }
  const filter = $("filter").value;
  snapshot.instances.forEach((one, place) => {
    let of = lines.get(one.url);
    if (!of || of.label.textContent !== one.name) {
      of?.row.remove();
      of = line(one.name);
      lines.set(one.url, of);
      set(of.label, one.name);
    }
    if (body.children[place] !== of.row) body.insertBefore(of.row, body.children[place] ?? null);
    const state = health(one);
    const { used, peak } = kv(one);
    of.row.dataset.state = state;
    const predictor = one.predictor === undefined ? "" : `\npredictor ${short(one.predictor) || "none"}`;
    const model = one.model ? `, ${one.model}` : "";
    set(of.model, one.model ?? "");
    of.model.hidden = !one.model;
    of.button.title = `${one.name}: ${one.why ?? state}, ${roleOf(one)}${model}, ${one.url}${predictor}\nShow only its requests`;
    of.button.setAttribute("aria-label", `${one.name}, ${state}: show only its requests`);
    of.button.setAttribute("aria-pressed", filter === one.name);
    set(of.glyph, GLYPHS[state]);
    const growth = Math.max(0, Math.min(peak, 1) - used) || 0;
    of.used.style.width = `${100 * (used || 0)}%`;
    of.growth.style.width = `${100 * growth}%`;
    of.bar.title = one.kv_blocks
      ? `${one.kv_blocks_used} of ${one.kv_blocks} blocks, ${one.resident_tokens} of ${one.capacity_tokens} tokens; ` +
        `predicted peak ${one.predicted_peak_tokens == null ? "unknown" : Math.round(one.predicted_peak_tokens)}; ${one.pinned} pinned`
      : (one.why ?? "no report");
    set(of.cells.kv, percent(used));
    set(of.cells.peak, state !== "ready" ? state : one.next_role ? `→ ${one.next_role}` : percent(peak));
    of.cells.peak.classList.toggle("alarm", peak > 1 || state !== "ready");
    set(of.cells.running, count(one.running));
    set(of.cells.waiting, count(one.waiting));
    of.cells.waiting.classList.toggle("alarm", one.waiting > 0 && one.role !== "prefill");
    set(of.cells.step, one.step_time_s ? seconds(one.step_time_s) : "–");
    set(of.cells.preemptions, count(one.preemptions));
  });
  const bad = snapshot.instances.filter((one) => health(one) !== "ready").length;
  set($("instances-count"), `${snapshot.instances.length}${bad ? ` · ${bad} not ready` : ""}`);
}

// --- moves, and changes of instances ---

function drawHappened() {
  happened.draw();
  set($("moves-count"), happened.moves ? `last ${happened.moves}` : "none yet");
}

// --- requests ---

const commands = new Commands($("command"));
const list = new RequestList($("rows"), $("spacer"), (id, about, instance) => {
  // With several models, only instances of the request's own take it.
  const model = snapshot.requests.model?.[snapshot.requests.id.indexOf(id)];
  const able = decode().filter((one) => one.name !== instance && one.model === model && health(one) === "ready");
  commands.move(id, about, able.map((one) => one.name));
});

function drawRequests() {
  const { matching, scale } = list.show(snapshot.requests);
  const sent = snapshot.requests.id?.length ?? 0;
  const parts = [matching < sent ? `${count(matching)} of ${count(sent)}` : count(sent)];
  if (snapshot.requests_total > sent) parts.push(`the largest of ${count(snapshot.requests_total)}`);
  set($("requests-count"), parts.join(" · "));
  set($("scale"), `full width = ${count(scale)} tokens`);
  const idle = snapshot.requests_total === 0;
  $("first").hidden = !idle;
  $("rows").hidden = idle;
  if (idle) set(document.querySelector("#first pre"), firstRequest(location.href, snapshot.model_name ?? snapshot.model, snapshot.client_keys));
}

// --- charts ---

const three = (name) => [
  { name: `${name}_p50`, label: "p50", color: "blue" },
  { name: `${name}_p90`, label: "p90", color: "orange", dash: [5, 3] },
  { name: `${name}_p99`, label: "p99", color: "red", dash: [2, 2] },
];
const charts = new Charts($("charts"), history, [
  { title: "TTFT", format: seconds, series: three("ttft") },
  { title: "TPOT", format: seconds, series: three("tpot") },
  { title: "Longest gap", format: seconds, series: three("gap") },
  {
    title: "KV",
    format: percent,
    limit: 1,
    series: [
      { name: "kv_max", label: "max", color: "blue" },
      { name: "kv_min", label: "min", color: "green", dash: [5, 3] },
      { name: "kv_peak", label: "predicted", color: "orange", dash: [2, 2] },
    ],
  },
  {
    title: "Requests",
    format: count,
    series: [
      { name: "running", label: "run", color: "blue" },
      { name: "waiting", label: "wait", color: "orange", dash: [5, 3] },
      { name: "queued", label: "queue", color: "red", dash: [2, 2] },
      { name: "suspended", label: "susp", color: "purple", dash: [8, 3] },
    ],
  },
  {
    title: "Prediction error",
    format: count,
    series: [
      { name: "error_mean", label: "mean", color: "blue" },
      { name: "error_p90", label: "p90", color: "orange", dash: [5, 3] },
    ],
  },
  {
    title: "Events",
    format: count,
    kind: "bars",
    series: [
      { name: "new_moves", label: "moves", color: "blue" },
      { name: "new_preemptions", label: "preemptions", color: "red" },
    ],
  },
]);

const learner = new LearnerPanel($("learner"), $);

// --- drawing ---

function draw() {
  frameRequested = false;
  if (!snapshot || document.hidden) return;
  document.querySelector("main").hidden = false;
  set($("model"), snapshot.model);
  set($("preset"), snapshot.preset);
  document.title = `${count(now.running)} running, KV ${percent(now.kv_max)} · ARES`;
  charts.draw();
  drawTiles();
  drawInstances();
  drawHappened();
  drawRequests();
  learner.draw(snapshot);
}

let problem = "";

function showConnection() {
  const age = (performance.now() - receivedAt) / 1000;
  const stale = age > LATE_S;
  const state = !snapshot ? "connecting" : stale ? "stale" : paused ? "paused" : "live";
  document.body.dataset.state = state;
  $("connection").dataset.state = state;
  set($("connection"), state === "stale" ? `stale, ${Math.floor(age)} s` : state);
  const asks = !$("key").hidden;
  $("banner").hidden = asks || !(stale && (snapshot || problem));
  const when = snapshot ? `No data since ${clock(snapshot.now)}: the page shows old data. ` : "";
  if (!$("banner").hidden) set($("banner"), `${when}${problem ? `${problem}. Trying again.` : "Waiting for the gateway."}`);
}
setInterval(showConnection, 500);

// --- controls ---

function askKey(refused) {
  $("key").hidden = false;
  $("forget").hidden = true;
  if (refused) set($("key-note"), "The gateway refuses that key.");
  $("key-input").focus();
  return new Promise((resolve) => {
    $("key").onsubmit = (event) => {
      event.preventDefault();
      key.set($("key-input").value);
      $("key-input").value = "";
      $("key").hidden = true;
      resolve();
    };
  });
}

function pause() {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  set($("pause"), paused ? "Resume" : "Pause");
  showConnection();
  if (!paused) draw();
}

for (const name of ORDERS) $("order").append(new Option(name, name));
$("order").addEventListener("change", () => {
  list.order = $("order").value;
  if (snapshot) drawRequests();
});
$("filter").addEventListener("input", () => {
  list.filter = $("filter").value;
  $("rows").scrollTop = 0;
  if (snapshot) {
    drawRequests();
    drawInstances();
  }
});
$("range").addEventListener("change", () => {
  charts.range = Number($("range").value);
  charts.draw();
});
$("pause").addEventListener("click", pause);
$("change-preset").addEventListener("click", () => snapshot && commands.preset(snapshot.preset, snapshot.presets ?? [snapshot.preset]));
$("copy").hidden = !navigator.clipboard; // not without TLS
$("copy").addEventListener("click", () => navigator.clipboard.writeText(document.querySelector("#first pre").textContent));
$("forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});
document.addEventListener("visibilitychange", () => !paused && draw());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === $("filter")) $("filter").blur();
  if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) || $("command").open) return;
  if (event.key === "/") {
    event.preventDefault();
    $("filter").focus();
  } else if (event.key === "p") pause();
});

follow({
  event: take,
  connected: () => {
    problem = "";
    $("forget").hidden = key.get() === null;
  },
  lost: (why) => {
    problem = why;
    showConnection();
  },
  key: askKey,
});
