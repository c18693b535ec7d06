// The life of a request: sent, watched or asked after, and settled. A record of it is
// {key, created, body, image, mask, job, state, position, eta, error, pictures}; key is the
// Idempotency-Key, so a record that is sent again, after a reload too, is the same job. Each of
// its pictures is {step, total, seed, settings, notes, file, preview}.

import { Refusal, Unreachable, ask, connection, events, isCutOff } from "./api.js";

const PICTURES = "/api/v1/pictures";
const STREAMS = 2; // a browser has six connections to a server, for all of its tabs
const POLL = 2000; // milliseconds between questions after those that are not watched
const MOST_KEPT = 200; // records; the oldest that are over go first
const PREVIEW_EVERY = 2; // steps
const UNFINISHED = new Set(["unsent", "queued", "running"]);
const LATER = new Set([401, 429, 503]); // what may be answered otherwise soon
const LOST =
  "The server no longer has this picture: it was started anew, or it was finished too long ago.";

/** Whether something is still to come of a record. */
export function isUnfinished(record) {
  return UNFINISHED.has(record.state);
}

/** Returns the body that draws a record's pictures, or one of them, bit for bit again. */
export function bodyAgain(record, index = null) {
  const seeds = record.pictures.map((picture) => picture.seed);
  if (seeds.includes(undefined)) return record.body; // it never came to the server
  const { seed: _, ...body } = record.body;
  if (index === null) return { ...body, seed: seeds };
  const { num_images_per_prompt: __, ...single } = body;
  return { ...single, seed: seeds[index] };
}

/** All requests that this browser knows; `show` is told of each that changed, `gone` of its end. */
export class Jobs {
  #store;
  #show;
  #gone;
  #problem;
  #streams = new Map();
  #polling = null;
  #sending = new Set();
  #seen = new Map();

  constructor(store, { show, gone, problem }) {
    this.records = new Map();
    this.#store = store;
    this.#show = show;
    this.#gone = gone;
    this.#problem = problem;
    connection.addEventListener("found", () => this.#attend(0));
    document.addEventListener("visibilitychange", () => this.#attend());
  }

  /** Shows what this browser kept, and picks up what is unfinished. */
  async load() {
    for (const record of await this.#store.all()) {
      this.records.set(record.key, record);
      this.#show(record);
    }
    this.#attend(0);
  }

  /**
   * Draws a request; image and mask: Blobs or null. Throws a Refusal, and keeps nothing then; one
   * that nobody answered is sent when the server is back.
   */
  async begin(body, image = null, mask = null, previews = true) {
    const count = body.num_images_per_prompt ?? 1;
    const sent = previews ? { preview_every: PREVIEW_EVERY, ...body } : body;
    const pictures = Array.from({ length: count }, () => ({ step: 0, total: 0, file: null }));
    const record = { key: newKey(), created: Date.now(), body: sent, image, mask, job: null };
    Object.assign(record, { state: "unsent", position: null, eta: null, error: null, pictures });
    await this.#keep(record);
    await this.#letOldestGo();
    this.records.set(record.key, record);
    try {
      await this.#send(record);
    } catch (error) {
      if (!(error instanceof Unreachable)) {
        await this.remove(record);
        throw error;
      }
      this.#show(record);
    }
    this.#attend();
    return record;
  }

  /** Cancels what is unfinished. */
  async cancel(record) {
    if (record.job === null) {
      await this.remove(record);
      return;
    }
    const answer = await ask(`${PICTURES}/${record.job}`, { method: "DELETE" });
    await this.#settle(record, await answer.json());
  }

  /** Lets a record and its pictures go; what is unfinished is cancelled. */
  async remove(record) {
    this.#streams.get(record.key)?.abort();
    this.records.delete(record.key);
    this.#gone(record);
    await this.#store.remove(record.key);
    if (isUnfinished(record) && record.job !== null) {
      await ask(`${PICTURES}/${record.job}`, { method: "DELETE" });
    }
  }

  async #send(record) {
    this.#sending.add(record.key);
    try {
      const body = { ...record.body };
      if (record.image) body.image = await base64Of(record.image);
      if (record.mask) body.mask = await base64Of(record.mask);
      const headers = { "idempotency-key": record.key };
      const sent = { method: "POST", body: JSON.stringify(body), headers };
      const described = await (await ask(PICTURES, sent)).json();
      record.job = described.id;
      if (this.records.has(record.key)) await this.#settle(record, described);
      else await ask(`${PICTURES}/${record.job}`, { method: "DELETE" }); // removed meanwhile
    } finally {
      this.#sending.delete(record.key);
    }
  }

  /** Sends what nobody answered before; it waits on where the server has no room yet. */
  async #resend(record) {
    try {
      await this.#send(record);
    } catch (error) {
      if (error instanceof Refusal && !LATER.has(error.status)) {
        await this.#end(record, "failed", error.message);
      }
    }
  }

  /** Sends, watches or asks after all that is unfinished, as far as there are connections. */
  #attend(pause = POLL) {
    clearTimeout(this.#polling);
    if (document.hidden) for (const watched of this.#streams.values()) watched.abort();
    if (isCutOff()) return;
    const waiting = [...this.records.values()].filter(isUnfinished);
    for (const record of waiting) {
      const watched = document.hidden || record.job === null || this.#streams.has(record.key);
      if (!watched && this.#streams.size < STREAMS) this.#watch(record);
    }
    if (waiting.some((record) => !this.#isSeenTo(record))) {
      this.#polling = setTimeout(() => this.#poll(waiting), pause);
    }
  }

  #isSeenTo(record) {
    return this.#streams.has(record.key) || this.#sending.has(record.key);
  }

  async #poll(records) {
    for (const record of records) {
      if (!isUnfinished(record) || this.#isSeenTo(record)) continue;
      await (record.job === null ? this.#resend(record) : this.#inquire(record));
    }
    this.#attend();
  }

  async #watch(record) {
    const watched = new AbortController();
    this.#streams.set(record.key, watched);
    try {
      const path = `${PICTURES}/${record.job}/events`;
      const after = this.#seen.get(record.key);
      for await (const event of events(path, { after, signal: watched.signal })) {
        this.#seen.set(record.key, event.number);
        if (event.name === "picture") await this.#inquire(record);
        else this.#take(record, event);
      }
      await this.#inquire(record);
    } catch {
      if (!watched.signal.aborted) {
        await this.#inquire(record); // broken or refused: this tells which
        await new Promise((done) => setTimeout(done, POLL));
      }
    }
    this.#streams.delete(record.key);
    this.#attend(0);
  }

  #take(record, { name, data }) {
    const picture = record.pictures[data.index];
    if (name === "queued") Object.assign(record, { position: data.position, eta: data.eta_s });
    else if (name === "started") picture.total = data.total;
    else if (name === "step") Object.assign(picture, { step: data.step, total: data.total });
    else if (name === "preview") picture.preview = `data:image/jpeg;base64,${data.jpeg}`;
    else return; // what is over is asked for as a whole
    if (name !== "queued") record.state = "running";
    this.#show(record);
  }

  /** Asks how far a record is; what cannot be answered now is asked later. */
  async #inquire(record) {
    try {
      const answer = await ask(`${PICTURES}/${record.job}`);
      await this.#settle(record, await answer.json());
    } catch (error) {
      if (error instanceof Refusal && error.status === 404) await this.#end(record, "lost", LOST);
    }
  }

  /** Takes the server's description of a record; fetches its pictures once it is done. */
  async #settle(record, described) {
    Object.assign(record, { position: described.position, eta: described.eta_s });
    record.body.model = described.model;
    for (const { index, step, total, seed, settings, notes, image } of described.pictures) {
      const picture = record.pictures[index];
      Object.assign(picture, { step, total, seed, settings, notes });
      if (image && !picture.file) picture.file = await (await ask(image)).blob();
    }
    if (!this.records.has(record.key)) return; // removed meanwhile
    const over = !UNFINISHED.has(described.state);
    if (over) await this.#end(record, described.state, described.error?.message ?? null);
    else {
      record.state = described.state;
      await this.#keep(record);
      this.#show(record);
    }
  }

  async #end(record, state, error) {
    Object.assign(record, { state, error });
    for (const picture of record.pictures) delete picture.preview;
    this.#streams.get(record.key)?.abort();
    await this.#keep(record);
    this.#show(record);
  }

  async #keep(record) {
    try {
      await this.#store.put(record);
    } catch {
      this.#problem(new Error("This browser has no room to keep pictures; remove some."));
    }
  }

  /** Makes room for one more. */
  async #letOldestGo() {
    const over = [...this.records.values()].filter((record) => !isUnfinished(record));
    const surplus = Math.max(this.records.size + 1 - MOST_KEPT, 0);
    for (const record of over.slice(0, surplus)) await this.remove(record);
  }
}

function newKey() {
  // crypto.randomUUID is not there on pages that came over plain HTTP from another machine
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function base64Of(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
