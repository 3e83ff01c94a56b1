// What an operator may do: commands to the gateway, each asked for in a dialog that shows the answer, or the refusal in words.

import { make, set } from "./elements.js";
import { key } from "./feed.js";
import { count, roleOf, seconds } from "./model.js";

const ADMIN = "admin/v1/"; // relative, as the feed's address

/** Send a command; returns {done} with the reply, or {refusal, code}. */
async function send(method, path, body) {
  const given = key.get();
  const headers = given === null ? {} : { Authorization: `Bearer ${given}` };
  if (body) headers["Content-Type"] = "application/json";
  try {
    const response = await fetch(ADMIN + path, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
    const said = await response.json();
    if (response.ok) return { done: said };
    return { refusal: said.error?.message ?? `the gateway answers ${response.status}`, code: said.error?.code };
  } catch (error) {
    return { refusal: `the gateway does not answer (${error.message}); look whether it was done` };
  }
}

/** The dialog of all commands. */
export class Commands {
  #dialog;
  #parts = {};
  #command = null;

  constructor(dialog) {
    const parts = (this.#parts = {
      title: make("h2"),
      about: make("p", "dim"),
      label: make("span"),
      choice: make("select"),
      answer: make("p"),
      go: make("button"),
      close: make("button"),
    });
    parts.title.id = "command-title";
    parts.answer.setAttribute("role", "status");
    parts.close.type = "button";
    parts.close.addEventListener("click", () => dialog.close());
    parts.field = make("label", "", parts.label, parts.choice);
    const form = make("form", "", parts.title, parts.about, parts.field, parts.answer, make("p", "buttons", parts.go, parts.close));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#carryOut();
    });
    dialog.setAttribute("aria-labelledby", parts.title.id);
    dialog.append(form);
    this.#dialog = dialog;
  }

  /** Drain an instance, or put it back into service. */
  instance(one) {
    const path = `instances/${encodeURIComponent(one.name)}`;
    const about = `${roleOf(one)}, ${one.url}: ${one.why ?? (one.draining ? "draining" : "in service")}. ${count(one.running)} requests run there.`;
    if (one.draining) {
      this.#open({
        title: one.name,
        about: `${about} Undrained, it takes requests again.`,
        go: "Undrain",
        send: () => send("POST", `${path}/undrain`),
        said: () => `${one.name} is in service.`,
      });
      return;
    }
    this.#open({
      title: one.name,
      about: `${about} Drained, it takes nothing new, and what can be moved leaves it.`,
      go: "Drain",
      send: (force) => send("POST", `${path}/drain`, force ? { force: true } : {}),
      force: { code: "last_instance", go: "Drain nevertheless" },
      said: (reply) => `${one.name} drains; ${count(reply.left)} requests are left.`,
    });
  }

  /** Move a request; `about` says what it is, `targets` are names of instances. */
  move(id, about, targets) {
    this.#open({
      title: id,
      about,
      label: "Move to",
      choices: targets,
      go: "Move",
      send: (_, target) => send("POST", "migrations", { request_id: id, target }),
      said: ({ outcome, target, stall_s }) => {
        if (outcome !== "moved") return `Not moved: ${outcome.replaceAll("_", " ")}.`;
        return `It runs on ${target}${stall_s == null ? "" : `; its stream stalled for ${seconds(stall_s)}`}.`;
      },
    });
  }

  /** Decide by another preset. */
  preset(current, presets) {
    this.#open({
      title: "Policy preset",
      about: "How requests are placed and when they move, also for those that wait already. Only until the gateway restarts.",
      label: "Decide by",
      choices: presets,
      chosen: current,
      go: "Change",
      send: (_, preset) => send("PUT", "preset", { preset }),
      said: ({ preset }) => `The gateway decides by ${preset}.`,
    });
  }

  #open(command) {
    const { title, about, label, field, choice, answer, go, close } = this.#parts;
    this.#command = command;
    this.#force = false;
    set(title, command.title);
    set(about, command.about);
    set(answer, "");
    set(go, command.go);
    set(close, "Cancel");
    field.hidden = !command.choices;
    if (command.choices) {
      set(label, command.label);
      choice.replaceChildren(...command.choices.map((name) => new Option(name, name, false, name === command.chosen)));
    }
    go.hidden = false;
    go.disabled = command.choices?.length === 0;
    if (go.disabled) set(answer, "There is no other instance that decodes.");
    answer.classList.remove("alarm");
    this.#dialog.showModal();
  }

  #force = false;

  async #carryOut() {
    const { choice, answer, go, close } = this.#parts;
    const command = this.#command;
    go.disabled = true;
    set(answer, "One moment…");
    const { done, refusal, code } = await command.send(this.#force, choice.value);
    if (command !== this.#command) return; // another dialog was opened meanwhile
    answer.classList.toggle("alarm", done === undefined);
    set(answer, done === undefined ? refusal : command.said(done));
    if (done !== undefined) {
      go.hidden = true;
      set(close, "Close");
      close.focus();
      return;
    }
    go.disabled = false;
    if (command.force?.code === code) {
      this.#force = true;
      set(go, command.force.go);
    }
  }
}

/** A line for a shell that sends a first request to the gateway of this page. */
export function firstRequest(page, model, needsKey) {
  const body = JSON.stringify({ model, messages: [{ role: "user", content: "What is gravity?" }], max_tokens: 400, stream: true });
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const header = needsKey ? ` -H "Authorization: Bearer $KEY"` : "";
  const url = new URL("v1/chat/completions", page).href;
  return `curl -N ${quoted(url)} -H 'Content-Type: application/json'${header} -d ${quoted(body)}`;
}
