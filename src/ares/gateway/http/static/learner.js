// What learners of the predictor report: champion, challenger, their losses over time, and the newest events.

import { Charts } from "./charts.js";
import { make, set } from "./elements.js";
import { History, count, date } from "./model.js";

const MODELS = ["curve", "champion", "challenger"];
const LOSSES = 200; // as many as a report has
const SHORTEST_S = 60; // range of the chart, also where there are few losses

/** The first digits of a version of the predictor; empty for none. */
export const short = (version) => (version ?? "").slice(0, 12);

/** The losses over all positions, or of the newest position where there are no such ones. */
export function shownLosses(losses) {
  const position = losses.some((one) => one.position === "all") ? "all" : losses.at(-1)?.position;
  return losses.filter((one) => one.position === position);
}

/** Instances that report, with another version than the champion. */
export function otherVersions(instances, champion) {
  return instances.filter((one) => one.healthy && one.predictor !== undefined && one.predictor !== champion.version);
}

/** The part of the page about the learner that has reported last; hidden until one reports. */
export class LearnerPanel {
  #learners = [];
  #changed = false;
  #events = new Map(); // elements of the events that are shown

  constructor(section, id) {
    this.section = section;
    this.id = id;
    this.charts = new Charts(
      id("learner-chart"),
      new History(MODELS, LOSSES),
      [
        {
          title: "Loss of the predictor (mean CRPS, tokens)",
          format: count,
          series: [
            { name: "curve", label: "curve", color: "orange", dash: [2, 2] },
            { name: "champion", label: "champion", color: "blue" },
            { name: "challenger", label: "challenger", color: "green", dash: [5, 3] },
          ],
        },
      ],
      Infinity, // losses come as outputs end, not each second
    );
  }

  /** Take the reports of all learners, the newest first. */
  take(learners) {
    this.#learners = learners;
    this.#changed = true;
  }

  draw(snapshot) {
    const [learner, ...others] = this.#learners;
    this.section.hidden = !learner;
    this.section.parentElement.toggleAttribute("data-learner", Boolean(learner));
    if (!learner) return;
    const age = (one) => snapshot.learner_ages_s?.[one.learner] ?? one.age_s;
    const old = (one) => age(one) > snapshot.learner_old_s;
    const { outputs } = learner;
    this.section.dataset.state = old(learner) ? "old" : "reports";
    const parts = [
      old(learner) ? `no report for ${Math.floor(age(learner))} s; before: ${learner.doing}` : learner.doing,
      learner.frozen && learner.doing !== "frozen" ? "frozen" : "",
      `${count(outputs.recorded)} outputs recorded, ${count(outputs.needed)} needed`,
      `learner ${learner.learner}`,
      ...others.map((one) => `also ${one.learner}${old(one) ? ` (no report for ${Math.floor(age(one))} s)` : ""}`),
    ];
    set(this.id("learner-state"), parts.filter(Boolean).join(" · "));
    this.#drawOthers(snapshot.instances, learner.champion);
    if (!this.#changed) return;
    this.#changed = false;
    this.#drawPredictors(learner);
    this.#drawLosses(shownLosses(learner.losses));
    this.#drawEvents(learner.events);
  }

  #drawPredictors(learner) {
    const losses = shownLosses(learner.losses).at(-1);
    const rows = MODELS.filter((model) => model === "curve" || learner[model]).map((model) => {
      const of = learner[model];
      const version = make("td", "number", of ? short(of.version) || of.kind : "–");
      version.title = of?.version ?? "";
      const name = make("th", "", model);
      name.scope = "row";
      return make(
        "tr", "", name, version,
        make("td", "number", of ? count(of.trained_outputs) : "–"),
        make("td", "number", of ? date(of.since) : "–"),
        make("td", "number", typeof losses?.[model] === "number" ? losses[model].toFixed(1) : "–"),
      );
    });
    this.section.querySelector("tbody").replaceChildren(...rows);
  }

  #drawOthers(instances, champion) {
    const others = otherVersions(instances, champion);
    const names = others.map((one) => `${one.name} (${short(one.predictor) || "none"})`).join(", ");
    const element = this.id("learner-others");
    element.hidden = !others.length;
    set(element, `another version than the champion: ${names}`);
  }

  /** Add the new ones on top; what is shown already stays, so that only a new one is highlighted. */
  #drawEvents(events) {
    const current = new Set(events.map(identity));
    for (const [name, element] of this.#events) {
      if (current.has(name)) continue;
      element.remove();
      this.#events.delete(name);
    }
    for (const event of events) {
      const name = identity(event);
      if (this.#events.has(name)) continue;
      this.#events.set(name, eventLine(event));
      this.id("learner-events").prepend(this.#events.get(name));
    }
  }

  #drawLosses(losses) {
    const history = new History(MODELS, LOSSES);
    for (const one of losses) history.push(one.time, one);
    this.charts.history = history;
    this.charts.range = Math.max(SHORTEST_S, losses.length ? losses.at(-1).time - losses[0].time : 0);
    this.charts.draw();
  }
}

const identity = (event) => [event.time, event.event, event.version].join();

function eventLine(event) {
  const kind = make("span", "kind", event.event.replaceAll("_", " "));
  kind.dataset.event = event.event;
  const version = make("span", "number dim", short(event.version));
  version.title = event.version;
  return make("li", "", make("time", "number dim", date(event.time)), kind, version, make("span", "text", event.text));
}
