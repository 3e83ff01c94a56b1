// The list of requests: one bar each, as many rows of the page as fit on it, used again while it scrolls.

import { set } from "./elements.js";
import { count, scaleOf, select, stateOf } from "./model.js";

const HEIGHT = 22; // CSS pixels, as in the style sheet
const EXTRA_ROWS = 4; // above and below the visible ones

const part = (className) => {
  const element = document.createElement("span");
  element.className = className;
  return element;
};

class Row {
  constructor() {
    this.element = part("request");
    this.element.setAttribute("role", "row");
    this.cells = {};
    for (const name of ["id", "instance", "state", "bar", "tokens", "moves"]) {
      this.cells[name] = part(name);
      this.cells[name].setAttribute("role", "cell");
      this.element.append(this.cells[name]);
    }
    this.button = document.createElement("button");
    this.button.type = "button";
    this.cells.id.append(this.button);
    this.bars = ["prompt", "output", "remaining", "whisker"].map(part);
    this.cells.bar.append(...this.bars);
  }

  show(requests, i, place, scale) {
    const { cells, element } = this;
    const [prompt, resident] = [requests.prompt_tokens[i], requests.resident_tokens[i]];
    const [low, middle, high] = [requests.remaining_p10[i], requests.remaining_p50[i], requests.remaining_p90[i]];
    const state = stateOf(requests, i);
    const instance = requests.instance[i] ?? "–";
    element.style.transform = `translateY(${place * HEIGHT}px)`;
    element.setAttribute("aria-rowindex", place + 1);
    element.dataset.state = state;
    element.dataset.odd = place % 2;
    element.dataset.beyond = resident + (high ?? 0) > scale;
    set(this.button, requests.id[i]);
    this.button.setAttribute("aria-label", `${requests.id[i]}: move it`);
    element.dataset.instance = requests.instance[i] ?? "";
    set(cells.instance, instance);
    set(cells.state, state);
    set(cells.tokens, middle === null ? count(resident) : `${count(resident)} + ${count(middle)}`);
    set(cells.moves, requests.moves[i] ? `${requests.moves[i]}×` : "");
    const known = middle !== null;
    const share = (tokens) => `${(100 * Math.max(tokens, 0)) / scale}%`;
    const [promptBar, outputBar, remainingBar, whisker] = this.bars;
    promptBar.style.width = share(Math.min(prompt, resident));
    outputBar.style.width = share(resident - prompt);
    remainingBar.style.width = share(known ? middle : 0);
    whisker.hidden = !known;
    whisker.style.left = share(resident + (low ?? 0));
    whisker.style.width = share((high ?? 0) - (low ?? 0));
    const prediction = known ? `, ${middle} to go (P10 ${low}, P90 ${high})` : ", no prediction";
    const stays = requests.reason[i] && requests.reason[i] !== "moving" ? `; not movable: ${requests.reason[i]}` : "";
    element.title = `${requests.id[i]}\n${state} on ${instance}\n${prompt} prompt + ${resident - prompt} output tokens` +
      `${prediction}\n${requests.moves[i]} moves${stays}`;
  }
}

/** The list in `host`, a scrolling element that holds a spacer. */
export class RequestList {
  #rows = [];
  #requests = {};
  #shown = [];
  #scale = 1;
  #top = 0;
  #height = 0;

  /** `chosen(id, about, instance)`: the button of a request was pressed. */
  constructor(host, spacer, chosen) {
    host.addEventListener("click", ({ target }) => {
      const row = target.tagName === "BUTTON" ? target.closest(".request") : null;
      if (row) chosen(target.textContent, row.title.split("\n").slice(1).join("; "), row.dataset.instance);
    });
    this.host = host;
    this.spacer = spacer;
    this.order = "largest";
    this.filter = "";
    let requested = false;
    const draw = () => {
      requested = false;
      this.#draw();
    };
    const ask = () => {
      if (!requested) requestAnimationFrame(draw);
      requested = true;
    };
    // Recorded when they change: reading them while drawing would lay the page out again.
    host.addEventListener("scroll", () => {
      this.#top = host.scrollTop;
      ask();
    }, { passive: true });
    new ResizeObserver(([{ contentRect }]) => {
      this.#height = contentRect.height;
      ask();
    }).observe(host);
  }

  /** Show these requests (columns); return how many of them match, and the tokens at the full width. */
  show(requests = this.#requests) {
    this.#requests = requests;
    this.#shown = requests.id ? select(requests, this.order, this.filter) : [];
    this.#scale = scaleOf(requests, this.#shown);
    this.#draw();
    return { matching: this.#shown.length, scale: this.#scale };
  }

  #draw() {
    const shown = this.#shown;
    const height = `${shown.length * HEIGHT}px`;
    if (this.spacer.style.height !== height) this.spacer.style.height = height;
    this.host.setAttribute("aria-rowcount", shown.length);
    const first = Math.max(0, Math.floor(this.#top / HEIGHT) - EXTRA_ROWS);
    const wanted = Math.ceil(this.#height / HEIGHT) + 2 * EXTRA_ROWS;
    const visible = Math.max(0, Math.min(shown.length - first, wanted));
    while (this.#rows.length < visible) {
      const row = new Row();
      this.#rows.push(row);
      this.spacer.append(row.element);
    }
    // A row keeps its element while it scrolls: the place decides which one.
    for (let n = 0; n < this.#rows.length; n++) {
      const offset = (n - (first % this.#rows.length) + this.#rows.length) % this.#rows.length;
      const place = first + offset;
      this.#rows[n].element.hidden = offset >= visible;
      if (offset < visible) this.#rows[n].show(this.#requests, shown[place], place, this.#scale);
    }
  }
}
