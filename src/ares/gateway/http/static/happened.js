// What has happened, as one list: moves, and changes of instances' states; the newest first.

import { make } from "./elements.js";
import { clock, count, seconds } from "./model.js";

const SHOWN = 200; // of each: as many as the gateway sends again after a reconnection

export class Happened {
  #moves = []; // the newest first
  #changes = []; // likewise
  #elements = new Map();
  #list;

  constructor(list) {
    this.#list = list;
  }

  /** How many moves are shown. */
  get moves() {
    return this.#moves.length;
  }

  /** Take moves; returns how many are new: after a reconnection the newest ones come again. */
  takeMoves(data) {
    const same = (a) => (b) => a.started_at === b.started_at && a.request_id === b.request_id;
    return add(this.#moves, data, same);
  }

  /** Take changes; a gateway that has restarted counts them from one again. */
  takeChanges(data) {
    return add(this.#changes, data, (a) => (b) => a.number === b.number && a.at === b.at);
  }

  draw() {
    const shown = [...this.#moves, ...this.#changes].sort((a, b) => (b.started_at ?? b.at) - (a.started_at ?? a.at));
    const current = new Set(shown);
    for (const [one, element] of this.#elements) {
      if (!current.has(one)) {
        element.remove();
        this.#elements.delete(one);
      }
    }
    for (const one of shown.reverse()) {
      if (this.#elements.has(one)) continue;
      const element = "at" in one ? changeLine(one) : moveLine(one);
      this.#elements.set(one, element);
      this.#list.prepend(element);
    }
  }
}

/** Put what is new at the beginning, and keep the newest; returns how many are new. */
function add(known, data, same) {
  const newer = data.filter((one) => !known.some(same(one)));
  known.unshift(...newer.toReversed());
  known.length = Math.min(known.length, SHOWN);
  return newer.length;
}

function moveLine(move) {
  const outcome = make("span", "outcome", move.outcome === "moved" ? "✓ moved" : `✕ ${move.outcome.replaceAll("_", " ")}`);
  outcome.dataset.good = move.outcome === "moved";
  const figures = [
    move.stall_s === null ? "" : `stall ${seconds(move.stall_s)}`,
    move.pulled_tokens === null ? "" : `${count(move.pulled_tokens)} tokens`,
  ];
  const way = `${move.source} → ${move.target}`;
  return line("", move.started_at, [move.request_id, move.request_id], way, outcome, figures, move.reason);
}

/** A change of an instance's state, such as `joined`, `ready`, `lost`, `leaving` or `gone`. */
function changeLine(change) {
  const outcome = make("span", "outcome", change.state.replaceAll("_", " "));
  outcome.dataset.good = ["ready", "joined"].includes(change.state);
  const name = [change.instance, `${change.instance}, ${change.url}`];
  return line("change", change.at, name, "instance", outcome, [], change.why);
}

function line(kind, at, [name, title], way, outcome, figures, reason) {
  const id = make("span", "id", name);
  id.title = title;
  return make(
    "li", kind,
    make("time", "number dim", clock(at)),
    id,
    make("span", "way", way),
    outcome,
    make("span", "number figures", figures.filter(Boolean).join(" · ")),
    make("span", "reason dim", reason),
  );
}
