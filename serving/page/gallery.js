// The gallery: a card for every request, the newest first, kept up to date in place, so that what
// has the focus keeps it.

import { byId, make, say, sentence } from "./elements.js";
import { isUnfinished } from "./jobs.js";

const SAID = { running: "Drawing.", done: "The picture is finished.", cancelled: "Cancelled." };

/** The cards of all records; `actions` has what their buttons do. */
export class Gallery {
  #list = byId("cards");
  #cards = new Map();
  #actions;

  constructor(actions) {
    this.#actions = actions;
  }

  /** Shows a record as it is now; returns its card. */
  show(record) {
    let card = this.#cards.get(record.key);
    if (!card) {
      card = new Card(record, this.#actions);
      this.#cards.set(record.key, card);
      this.#list.prepend(card.element);
    }
    card.update();
    this.#count();
    return card;
  }

  /** Takes a record's card away; the focus goes to its neighbour. */
  remove(record) {
    const card = this.#cards.get(record.key);
    if (!card) return;
    const focused = card.element.contains(document.activeElement);
    const neighbour = card.element.nextElementSibling ?? card.element.previousElementSibling;
    this.#cards.delete(record.key);
    card.element.remove();
    card.release();
    if (focused) (neighbour?.querySelector("button") ?? byId("gallery")).focus();
    this.#count();
  }

  #count() {
    const drawn = [...this.#cards.values()].filter((card) => isUnfinished(card.record)).length;
    byId("empty").hidden = this.#cards.size > 0;
    byId("clear").hidden = this.#cards.size === 0;
    document.title = drawn ? `(${drawn}) Latentrt` : "Latentrt";
  }
}

class Card {
  #actions;
  #state = null;
  #urls = [];
  #status = make("p", { class: "status" });
  #progress = make("progress", { "aria-label": "Steps", max: 1, value: 0 });
  #buttons = make("div", { class: "buttons" });
  #pictures;

  constructor(record, actions) {
    this.record = record;
    this.#actions = actions;
    const count = record.pictures.length;
    this.#pictures = record.pictures.map(() => make("div", { class: "picture" }));
    const several = make("div", { class: count > 1 ? "pictures several" : "pictures" });
    several.append(...this.#pictures);
    const title = make("h3", { class: "prompt", dir: "auto" }, record.body.prompt || "(no prompt)");
    const below = make("div", { class: "below" }, title, this.#status, this.#progress, this.#buttons);
    this.element = make("li", { class: "card" }, several, below);
  }

  /** Shows the record as it is now. */
  update() {
    const { record } = this;
    this.element.dataset.state = record.state;
    this.#status.textContent = statusOf(record);
    const total = record.pictures.reduce((sum, { total }) => sum + (total || 0), 0);
    this.#progress.hidden = record.state !== "running";
    this.#progress.max = total || 1;
    this.#progress.value = stepsOf(record);
    record.pictures.forEach((picture, index) => this.#showPicture(picture, index));
    if (record.state === this.#state) return;
    if (this.#state !== null) say(SAID[record.state] ?? this.#status.textContent);
    this.#state = record.state;
    const focused = this.#buttons.contains(document.activeElement);
    this.#buttons.replaceChildren(...this.#buttonsOf(record));
    if (focused) this.#buttons.querySelector("button").focus();
  }

  /** Lets the files go that it shows. */
  release() {
    this.#urls.forEach((url) => url && URL.revokeObjectURL(url));
  }

  #showPicture(picture, index) {
    const place = this.#pictures[index];
    const { width, height } = { ...this.record.body, ...picture.settings };
    if (width && height) place.style.aspectRatio = `${width} / ${height}`;
    if (picture.file) {
      if (this.#urls[index]) return;
      this.#urls[index] = URL.createObjectURL(picture.file);
      const image = make("img", { src: this.#urls[index], alt: altOf(this.record, index) });
      const open = () => this.#actions.open(this.record, index);
      place.replaceChildren(make("button", { type: "button", onclick: open }, image));
      place.style.aspectRatio = "";
    } else if (picture.preview) {
      const shown = place.querySelector("img") ?? make("img", { alt: "Preview" });
      shown.src = picture.preview;
      if (!shown.isConnected) place.replaceChildren(shown);
    } else if (!isUnfinished(this.record)) place.replaceChildren();
  }

  #buttonsOf(record) {
    const button = (text, act, kind = "quiet", name = text) => {
      const press = () => this.#actions.run(() => act(record));
      const label = `${name}: ${shortened(record.body.prompt)}`;
      return make("button", { type: "button", class: kind, "aria-label": label, onclick: press }, text);
    };
    const { again, use, cancel, remove } = this.#actions;
    if (isUnfinished(record)) return [button("Cancel", cancel, "")];
    const repeat = record.state === "done" ? "Again" : "Try again";
    const reuse = button("Reuse", use, "quiet", "Reuse settings");
    return [button(repeat, again, ""), reuse, button("Remove", remove)];
  }
}

function stepsOf(record) {
  return record.pictures.reduce((sum, { step }) => sum + (step || 0), 0);
}

function altOf(record, index) {
  const prompt = record.body.prompt || "without a prompt";
  return record.pictures.length > 1 ? `Picture ${index + 1}: ${prompt}` : `Picture: ${prompt}`;
}

function shortened(text) {
  return text.length > 60 ? `${text.slice(0, 59)}…` : text || "no prompt";
}

function statusOf(record) {
  const { state, position, eta, error, pictures } = record;
  if (state === "unsent") return "Waiting for the server.";
  if (state === "queued") {
    const place = position ? `${position} ahead in the queue` : "Next in the queue";
    return eta >= 1 ? `${place}, about ${Math.round(eta)} s.` : `${place}.`;
  }
  if (state === "running") {
    const total = pictures.reduce((sum, picture) => sum + (picture.total || 0), 0);
    return `Step ${stepsOf(record)} of ${total}.`;
  }
  if (state === "cancelled") return "Cancelled.";
  if (state !== "done") return sentence(error ?? "it failed");
  const { width, height, num_inference_steps: steps } = pictures[0].settings ?? {};
  const size = width && height ? [`${width} × ${height}`] : [];
  const seeds = pictures.map(({ seed }) => seed);
  const told = seeds.length > 1 ? `seeds ${seeds[0]} to ${seeds.at(-1)}` : `seed ${seeds[0]}`;
  return [...size, `${steps} steps`, told].join(" · ");
}
