// Small line charts on canvas, over one history, with one cursor for all of them.

import { ceiling, clock } from "./model.js";

const AXIS = 40; // room for the labels of the axis, CSS pixels
const FOOT = 14;
const GAP_S = 5; // a longer silence breaks the line

/** Charts that share a history, a range and a cursor. */
export class Charts {
  /** `charts`: [{title, format, kind, limit, series: [{name, label, color, dash}]}]. */
  constructor(host, history, charts) {
    this.history = history;
    this.range = 300;
    this.cursor = null;
    this.charts = charts.map((chart) => new Chart(host, chart, this));
    new ResizeObserver(() => this.draw()).observe(host);
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
    this.group = group;
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const title = document.createElement("b");
    title.textContent = this.title;
    caption.append(title);
    this.values = this.series.map(({ label, color, dash }) => {
      const swatch = document.createElement("i");
      swatch.className = dash ? "line dashed" : "line";
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
    const width = this.canvas.clientWidth - AXIS;
    return this.#newest() - this.group.range * (1 - (x - AXIS) / width);
  }

  /** Samples in range, the newest first. */
  #count() {
    const { history, range } = this.group;
    const oldest = this.#newest() - range;
    let count = 0;
    while (count < history.length && history.times[history.at(count)] >= oldest) count++;
    return count;
  }

  draw(style) {
    const { history, range, cursor } = this.group;
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);

    const count = this.#count();
    let top = this.limit ?? 0;
    for (const { name } of this.series)
      for (let age = 0; age < count; age++) top = Math.max(top, history.series[name][history.at(age)] || 0);
    top = this.limit && top <= this.limit ? this.limit : ceiling(top);

    const newest = this.#newest();
    const floor = height - FOOT;
    const x = (time) => AXIS + (width - AXIS - 2) * (1 - (newest - time) / range);
    const y = (value) => floor - (floor - 6) * (value / top);
    this.#axes(context, style, width, floor, top, y, range);

    context.lineJoin = "round";
    const bar = Math.max(1.5, (width - AXIS) / range);
    for (const { name, color, dash } of this.series) {
      const values = history.series[name];
      context.strokeStyle = context.fillStyle = style.getPropertyValue(`--${color}`);
      context.setLineDash(dash ?? []);
      context.lineWidth = 1.5;
      context.beginPath();
      let before = NaN;
      for (let age = count - 1; age >= 0; age--) {
        const i = history.at(age);
        const time = history.times[i];
        if (Number.isNaN(values[i])) before = NaN;
        else if (this.kind === "bars") {
          if (values[i] > 0) context.fillRect(x(time) - bar, y(values[i]), bar, floor - y(values[i]));
        } else {
          if (time - before < GAP_S) context.lineTo(x(time), y(values[i]));
          else context.moveTo(x(time), y(values[i]));
          before = time;
        }
      }
      context.stroke();
    }
    context.setLineDash([]);

    const age = cursor === null ? 0 : history.nearest(cursor);
    if (cursor !== null && age >= 0) {
      context.fillStyle = style.getPropertyValue("--dim");
      const time = history.times[history.at(age)];
      context.fillRect(x(time), 0, 1, floor);
      context.textAlign = x(time) > width / 2 ? "right" : "left";
      context.fillText(clock(time), x(time) + (x(time) > width / 2 ? -4 : 4), 9);
    }
    const texts = this.series.map(({ name }) =>
      age < 0 ? "–" : this.format(history.series[name][history.at(age)]));
    texts.forEach((text, n) => { if (this.values[n].textContent !== text) this.values[n].textContent = text; });
    const told = this.series.map(({ label }, n) => `${label} ${texts[n]}`).join(", ");
    this.canvas.setAttribute("aria-label", `${this.title}: ${told}`);
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
      if (value === top || (value && label !== this.format(top))) context.fillText(label, AXIS - 4, at + 3.5);
    }
    context.textAlign = "left";
    context.fillText(`−${range / 60} min`, AXIS, floor + 11);
    context.textAlign = "right";
    context.fillText("now", width - 2, floor + 11);
  }
}
