// The dashboard's data, without a page: events out of a stream, histories of bounded size, orders and texts.

/** Server-sent events out of chunks of text; throws where an event grows beyond reason. */
export class EventParser {
  #rest = "";
  static LIMIT = 16 << 20;

  /** Return the events that `text` completes, as [{event, data}], the data parsed. */
  push(text) {
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop();
    if (this.#rest.length > EventParser.LIMIT) throw new Error("the stream sends no whole event");
    return blocks.map(EventParser.#read).filter((one) => one.data !== undefined);
  }

  static #read(block) {
    const fields = {};
    for (const line of block.split("\n")) {
      const colon = line.indexOf(":");
      if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
    }
    return { event: fields.event ?? "message", data: fields.data === undefined ? undefined : JSON.parse(fields.data) };
  }
}

/** The newest `capacity` samples of named quantities, in arrays that never grow; NaN stands for no value. */
export class History {
  constructor(names, capacity) {
    this.capacity = capacity;
    this.length = 0;
    this.times = new Float64Array(capacity);
    this.series = Object.fromEntries(names.map((name) => [name, new Float64Array(capacity)]));
    this._next = 0;
  }

  push(time, values) {
    this.times[this._next] = time;
    for (const [name, array] of Object.entries(this.series)) array[this._next] = values[name] ?? NaN;
    this._next = (this._next + 1) % this.capacity;
    this.length = Math.min(this.length + 1, this.capacity);
  }

  /** Place in the arrays of the sample that is `age` samples old; 0 is the newest. */
  at(age) {
    return (this._next - 1 - age + 2 * this.capacity) % this.capacity;
  }

  /** Age of the sample nearest to `time`; -1 where there is none. */
  nearest(time) {
    let low = 0;
    let high = this.length - 1;
    if (high < 0) return -1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.times[this.at(middle)] > time) low = middle + 1;
      else high = middle;
    }
    const newer = low - 1;
    if (newer < 0) return low;
    return this.times[this.at(newer)] - time < time - this.times[this.at(low)] ? newer : low;
  }
}

/** State of a request; derived where the gateway does not name it. */
export function stateOf(requests, i) {
  const named = requests.state?.[i];
  if (named) return named;
  if (requests.reason[i] === "moving") return "moving";
  return requests.instance[i] === null || requests.reason[i] === "not_decoding" ? "prefill" : "decode";
}

/** Tokens at the full width of a bar: the most of any request now, and the predicted end (P90) of 19 of 20. */
export function scaleOf(requests, shown) {
  const ends = Float64Array.from(shown, (i) => requests.resident_tokens[i] + Math.max(requests.remaining_p90[i] ?? 0, 0));
  ends.sort();
  const most = shown.reduce((most, i) => Math.max(most, requests.resident_tokens[i]), 1);
  return Math.max(most, ends[Math.floor(0.95 * (ends.length - 1))] ?? 0);
}

const KEYS = {
  largest: (requests, i) => -requests.resident_tokens[i],
  "longest to go": (requests, i) => -(requests.remaining_p50[i] ?? -1),
  "most moves": (requests, i) => -requests.moves[i],
};
export const ORDERS = [...Object.keys(KEYS), "instance"];

/** Indices of the requests to show: those that match every word of `filter`, in order. */
export function select(requests, order, filter = "") {
  const ids = requests.id ?? [];
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = [];
  for (let i = 0; i < ids.length; i++) {
    const model = requests.model?.[i] ?? "";
    const text = words.length ? `${ids[i]} ${requests.instance[i]} ${stateOf(requests, i)} ${model}`.toLowerCase() : "";
    if (words.every((word) => text.includes(word))) chosen.push(i);
  }
  const largest = (a, b) => requests.resident_tokens[b] - requests.resident_tokens[a];
  if (order === "instance") {
    const place = new Intl.Collator("en", { numeric: true });
    const names = [...new Set(requests.instance)].sort((a, b) => place.compare(a ?? "", b ?? ""));
    const rank = new Map(names.map((name, n) => [name, n]));
    return chosen.sort((a, b) => rank.get(requests.instance[a]) - rank.get(requests.instance[b]) || largest(a, b));
  }
  const key = KEYS[order] ?? KEYS.largest;
  return chosen.sort((a, b) => key(requests, a) - key(requests, b) || largest(a, b));
}

/** Share of an instance's KV in use, and at its predicted peak; NaN where unknown. */
export function kv(instance) {
  return {
    used: instance.kv_blocks ? instance.kv_blocks_used / instance.kv_blocks : NaN,
    peak: (instance.predicted_peak_tokens ?? NaN) / instance.capacity_tokens,
  };
}

/** The state of an instance, in the words of `ares status`. */
export function health(instance) {
  if (!instance.healthy) return "not ready";
  return instance.leaving ? "leaving" : instance.draining ? "draining" : "ready";
}

/** The role of an instance, and the one that it is about to have. */
export function roleOf(instance) {
  return instance.next_role ? `${instance.role} → ${instance.next_role}` : instance.role;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** The cluster in numbers, for the tiles and the charts. */
export function summary(snapshot) {
  const decode = snapshot.instances.filter((one) => one.role !== "prefill" && one.kv_blocks);
  const used = decode.map((one) => kv(one).used);
  const peaks = decode.filter((one) => one.predicted_peak_tokens != null).map((one) => kv(one).peak);
  const states = {};
  for (let i = 0; i < (snapshot.requests.id?.length ?? 0); i++) {
    const state = stateOf(snapshot.requests, i);
    states[state] = (states[state] ?? 0) + 1;
  }
  const { ttft_s: ttft, tpot_s: tpot, longest_gap_s: gap, prediction_error_tokens: error } = snapshot.recent;
  return {
    running: sum(decode.map((one) => one.running)),
    queued: sum(decode.map((one) => one.waiting)),
    waiting: snapshot.waiting ?? states.waiting ?? 0,
    suspended: snapshot.suspended ?? states.suspended ?? 0,
    moving: states.moving ?? 0,
    prefill: states.prefill ?? 0,
    kv_mean: used.length ? sum(decode.map((o) => o.kv_blocks_used)) / sum(decode.map((o) => o.kv_blocks)) : NaN,
    kv_max: used.length ? Math.max(...used) : NaN,
    kv_min: used.length ? Math.min(...used) : NaN,
    kv_peak: peaks.length ? Math.max(...peaks) : NaN,
    tokens_per_s: sum(decode.filter((o) => o.running && o.step_time_s).map((o) => o.running / o.step_time_s)),
    preemptions: sum(snapshot.instances.map((one) => one.preemptions ?? 0)),
    ttft_p50: ttft.p50,
    ttft_p90: ttft.p90,
    ttft_p99: ttft.p99,
    tpot_p50: tpot.p50,
    tpot_p90: tpot.p90,
    tpot_p99: tpot.p99,
    gap_p50: gap.p50,
    gap_p90: gap.p90,
    gap_p99: gap.p99,
    error_mean: error.mean_absolute,
    error_p90: error.p90_absolute,
  };
}

/** Seconds to wait before the n-th attempt to reconnect, `chance` between 0 and 1. */
export function backoff(attempt, chance) {
  return Math.min(0.5 * 2 ** attempt, 10) * (0.5 + 0.5 * chance);
}

const missing = (value) => value === null || value === undefined || Number.isNaN(value);

/** A count in at most five characters; the exact one belongs in a title. */
export function count(value) {
  if (missing(value)) return "–";
  const size = Math.abs(value);
  if (size < 10000) return String(Math.round(value));
  for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return (value / unit).toFixed(size < 100 * unit ? 1 : 0) + name;
}

export function seconds(value) {
  if (missing(value)) return "–";
  if (value >= 9.995) return `${value.toFixed(1)} s`;
  if (value >= 0.9995) return `${value.toFixed(2)} s`;
  return `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms`;
}

export function percent(value) {
  return missing(value) ? "–" : `${(100 * value).toFixed(0)} %`;
}

/** Time of day, in the reader's zone. */
export function clock(time) {
  const date = new Date(1000 * time);
  return [date.getHours(), date.getMinutes(), date.getSeconds()].map((n) => String(n).padStart(2, "0")).join(":");
}

/** Day and time, in the reader's zone. */
export function date(time) {
  const day = new Date(1000 * time);
  return [day.getMonth() + 1, day.getDate()].map((n) => String(n).padStart(2, "0")).join("-") + ` ${clock(time).slice(0, 5)}`;
}

/** A length of time for an axis. */
export function span(duration) {
  if (duration < 120 * 60) return `${Math.round(duration / 60)} min`;
  return `${(duration / 3600).toFixed(duration < 10 * 3600 ? 1 : 0)} h`;
}

/** The next round number for an axis that must reach `value`. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 2.5, 5, 10].find((n) => n * unit >= value * 0.999999) * unit;
}
