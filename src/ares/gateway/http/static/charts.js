// Small line charts on canvas, over one history, with one cursor for all of them.

import { set } from "./elements.js";
import { ceiling, clock, count, span } from "./model.js";

const AXIS = 40; // room for the labels of the axis, CSS pixels
const FOOT = 14;
const GAP_S = 5; // a longer silence breaks the line, unless a chart says otherwise
const BUCKETS = 30; // bars in a range

function stroke(context, xs, ys, times, gap) {
  context.lineWidth = 1.5;
  context.beginPath();
  let before = NaN;
  for (let k = 0; k < times.length; k++) {
    if (Number.isNaN(ys[k])) {
      before = NaN;
      continue;
    }
    if (times[k] - before < gap) context.lineTo(xs[k], ys[k]);
    else context.moveTo(xs[k], ys[k]);
    before = times[k];
  }
  context.stroke();
}

/** Charts that share a history, a range and a cursor. */
export class Charts {
  /** `charts`: [{title, format, kind, limit, series: [{name, label, color, dash}]}]; a silence above `gap` breaks lines. */
  constructor(host, history, charts, gap = GAP_S) {
    this.history = history;
    this.gap = gap;
    this.range = 300;
    this.cursor = null;
    this.charts = charts.map((chart) => new Chart(host, chart, this));
    // Sizes are recorded when they change: reading one while drawing would lay the page out again.
    const observer = new ResizeObserver((entries) => {
      for (const { target, contentRect } of entries) this.charts.find(({ canvas }) => canvas === target).size = contentRect;
      this.draw();
    });
    for (const { canvas } of this.charts) observer.observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  draw() {
    const style = getComputedStyle(document.documentElement);
    for (const chart of this.charts) chart.draw(style);
  }

  point(time) {
    this.cursor = time;
    this.draw();
  }
}

class Chart {
  constructor(host, chart, group) {
    Object.assign(this, chart);
    this.size = { width: 0, height: 0 };
    this.group = group;
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    this.heading = document.createElement("b");
    caption.append(this.heading);
    this.values = this.series.map(({ label, color, dash }) => {
      const swatch = document.createElement("i");
      swatch.className = "line";
      swatch.dataset.dash = !dash ? "solid" : dash[0] > 2 ? "dashed" : "dotted";
      swatch.style.setProperty("--color", `var(--${color})`);
      const value = document.createElement("span");
      value.className = "number";
      const entry = document.createElement("span");
      entry.append(swatch, `${label} `, value);
      caption.append(entry);
      return value;
    });
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.tabIndex = 0;
    figure.append(caption, this.canvas);
    host.append(figure);
    this.canvas.addEventListener("pointermove", (event) => group.point(this.#time(event.offsetX)));
    this.canvas.addEventListener("pointerleave", () => group.point(null));
    this.canvas.addEventListener("blur", () => group.point(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    const { history } = this.group;
    const step = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
    if (event.key === "Escape") this.group.point(null);
    if (!step || !history.length) return;
    event.preventDefault();
    const age = this.group.cursor === null ? 0 : history.nearest(this.group.cursor) + step;
    this.group.point(history.times[history.at(Math.min(Math.max(age, 0), history.length - 1))]);
  }

  #newest() {
    const { history } = this.group;
    return history.length ? history.times[history.at(0)] : 0;
  }

  #time(x) {
    return this.#newest() - this.group.range * (1 - (x - AXIS) / (this.size.width - AXIS));
  }

  /** Draw the range, and write the values at the cursor, or the newest ones. */
  draw(style) {
    const { history, range, cursor } = this.group;
    const context = this.#clear();
    if (!context) return;
    const { width } = this.size;
    const floor = this.size.height - FOOT;
    const newest = this.#newest();
    const bucket = range / BUCKETS;
    set(this.heading, this.kind === "bars" ? `${this.title} per ${bucket} s` : this.title);
    const lines = this.series.map(({ name }) => this.#points(history.series[name], newest, bucket));
    const most = Math.max(this.limit ?? 0, ...lines.map(({ values }) => values.reduce((a, b) => Math.max(a, b || 0), 0)));
    const top = most === this.limit ? most : ceiling(most);
    const x = (time) => AXIS + (width - AXIS - 2) * (1 - (newest - time) / range);
    const y = (value) => floor - (floor - 6) * (value / top);
    this.#axes(context, style, width, floor, top, y, range);
    lines.forEach(({ times, values }, n) => {
      const { color, dash } = this.series[n];
      context.strokeStyle = context.fillStyle = style.getPropertyValue(`--${color}`);
      context.setLineDash(dash ?? []);
      if (this.kind === "bars") {
        const thick = (x(bucket) - x(0)) / lines.length - 1;
        times.forEach((time, k) => context.fillRect(x(time) - (lines.length - n) * (thick + 1), y(values[k]), thick, floor - y(values[k])));
      } else stroke(context, times.map(x), values.map(y), times, this.group.gap);
    });
    context.setLineDash([]);
    const age = cursor === null ? 0 : history.nearest(cursor);
    const time = age < 0 ? NaN : history.times[history.at(age)];
    if (cursor !== null && age >= 0) this.#mark(context, style, x(time), width, floor, time);
    const texts = lines.map(({ times, values }) => {
      const place = this.kind === "bars" ? times.findIndex((end) => end >= time) : times.lastIndexOf(time);
      return this.format(values[place]);
    });
    texts.forEach((text, n) => set(this.values[n], text));
    this.canvas.setAttribute("aria-label", `${this.title}: ${this.series.map(({ label }, n) => `${label} ${texts[n]}`).join(", ")}`);
  }

  /** Samples in range, the oldest first; of bars, the sums over buckets, by the end of each. */
  #points(array, newest, bucket) {
    const { history, range } = this.group;
    const [times, values] = [[], []];
    for (let age = history.length - 1; age >= 0; age--) {
      const time = history.times[history.at(age)];
      const value = array[history.at(age)];
      if (time < newest - range) continue;
      const end = this.kind === "bars" ? Math.ceil(time / bucket) * bucket : time;
      if (times.at(-1) === end) values[values.length - 1] = this.kind === "bars" ? values.at(-1) + value : value;
      else {
        times.push(end);
        values.push(value);
      }
    }
    return { times, values };
  }

  /** The context of the emptied canvas, in CSS pixels; null while the canvas is not shown. */
  #clear() {
    const { width, height } = this.size;
    if (!width || !height) return null;
    const ratio = devicePixelRatio || 1;
    const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== wide || this.canvas.height !== high) Object.assign(this.canvas, { width: wide, height: high });
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.lineJoin = "round";
    return context;
  }

  #mark(context, style, at, width, floor, time) {
    context.fillStyle = style.getPropertyValue("--dim");
    context.fillRect(at, 0, 1, floor);
    context.textAlign = at > width / 2 ? "right" : "left";
    context.fillText(clock(time), at + (at > width / 2 ? -4 : 4), 9);
  }

  #axes(context, style, width, floor, top, y, range) {
    context.font = `10px ${style.getPropertyValue("--mono")}`;
    context.fillStyle = style.getPropertyValue("--dim");
    context.strokeStyle = style.getPropertyValue("--line");
    context.lineWidth = 1;
    context.textAlign = "right";
    for (const value of [0, top / 2, top]) {
      const at = Math.round(y(value)) + 0.5;
      context.beginPath();
      context.moveTo(AXIS, at);
      context.lineTo(width, at);
      context.stroke();
      const label = this.format(value);
      // Half of an odd count is no count.
      const exact = this.format !== count || Number.isInteger(value);
      if (value && exact) context.fillText(label, AXIS - 4, at + 3.5);
    }
    context.textAlign = "left";
    context.fillText(`−${span(range)}`, AXIS, floor + 11);
    context.textAlign = "right";
    context.fillText(this.group.gap === GAP_S ? "now" : clock(this.#newest()), width - 2, floor + 11);
  }
}
