// The connection to the gateway: it reconnects by itself, and reports its state.

import { EventParser, backoff } from "./model.js";

// Relative, so that the page also works below a prefix of a reverse proxy.
const EVENTS = "admin/v1/events";
const SILENT_MS = 10000;
const KEY = "ares-admin-key";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Read events for ever. `page`: {event(event, data), connected(), lost(why, seconds), key(refused) -> promise}. */
export async function follow(page) {
  for (let attempt = 0; ; attempt++) {
    let why;
    try {
      const reply = await open();
      if (reply.response.status === 401) {
        const refused = key.get() !== null;
        key.forget();
        await page.key(refused);
        attempt = -1;
        continue;
      }
      if (!reply.response.ok) throw new Error(await message(reply.response));
      page.connected();
      await read(reply, (event, data) => {
        attempt = 0;
        page.event(event, data);
      });
      why = "the gateway ended the stream";
    } catch (error) {
      why = error.name === "AbortError" ? "no data for 10 s" : error.message;
    }
    const pause = backoff(attempt, Math.random());
    page.lost(why, pause);
    await new Promise((resolve) => setTimeout(resolve, 1000 * pause));
  }
}

async function open() {
  const controller = new AbortController();
  let timer = setTimeout(() => controller.abort(), SILENT_MS);
  const received = () => {
    clearTimeout(timer);
    timer = setTimeout(() => controller.abort(), SILENT_MS);
  };
  const given = key.get();
  const headers = given === null ? {} : { Authorization: `Bearer ${given}` };
  try {
    const response = await fetch(EVENTS, { headers, cache: "no-store", signal: controller.signal });
    return { response, received, end: () => clearTimeout(timer) };
  } catch (error) {
    clearTimeout(timer);
    throw error;
  }
}

async function read({ response, received, end }, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      received();
      for (const { event, data } of parser.push(value)) take(event, data);
    }
  } finally {
    end();
    reader.cancel().catch(() => {});
  }
}

async function message(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the gateway answers ${response.status}`;
  }
}
