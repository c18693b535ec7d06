// One finished picture, large, with its settings and what can be done with it.

import { byId, make } from "./elements.js";

const NAMES = { num_inference_steps: "Steps", guidance_scale: "Guidance" };
const SHOWN_ELSEWHERE = new Set(["prompt", "notes", "width", "height"]);
const MEANING_NOTHING = new Set(["", "null", "[]", "false"]);

/** The dialog that shows a picture; `actions` has what its buttons do. */
export class Details {
  #dialog = byId("details");
  #actions;
  #url = null;

  constructor(actions) {
    this.#actions = actions;
    byId("details-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close(); // beside it
    });
    this.#dialog.addEventListener("close", () => this.#release());
  }

  /** Shows a picture of a record. */
  open(record, index) {
    this.#release();
    const picture = record.pictures[index];
    this.#url = URL.createObjectURL(picture.file);
    const prompt = picture.settings?.prompt ?? record.body.prompt;
    byId("details-body").replaceChildren(
      make("img", { class: "large", src: this.#url, alt: `Picture: ${prompt}` }),
      this.#buttons(record, index),
      make("p", { class: "prompt whole", dir: "auto" }, prompt),
      ...(picture.notes ?? []).map((note) => make("p", { class: "hint" }, note)),
      settingsOf(record, picture),
    );
    if (!this.#dialog.open) this.#dialog.showModal();
    this.#dialog.scrollTop = 0;
  }

  #buttons(record, index) {
    const { run, again, use, start } = this.#actions;
    const button = (text, act) => {
      const press = () => {
        this.#dialog.close();
        run(act);
      };
      return make("button", { type: "button", onclick: press }, text);
    };
    const picture = record.pictures[index];
    const name = `${nameOf(record)}-${picture.seed}.${picture.file.type.split("/")[1]}`;
    return make(
      "div",
      { class: "buttons" },
      button("Again", () => again(record, index)),
      button("Reuse settings", () => use(record, index)),
      button("Start from this", () => start(picture.file)),
      make("a", { class: "button", href: this.#url, download: name }, "Download"),
      this.#turn(record, index, -1, "Previous"),
      this.#turn(record, index, 1, "Next"),
    );
  }

  #turn(record, index, step, text) {
    const at = index + step;
    if (!record.pictures[at]?.file) return null;
    return make("button", { type: "button", onclick: () => this.open(record, at) }, text);
  }

  #release() {
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = null;
    byId("details-body").replaceChildren();
  }
}

function nameOf(record) {
  const words = record.body.prompt.normalize("NFKD").toLowerCase().match(/[a-z0-9]+/g) ?? [];
  return words.slice(0, 6).join("-").slice(0, 60) || "picture";
}

function settingsOf(record, picture) {
  const { width, height } = picture.settings ?? {};
  const told = { model: record.body.model, ...picture.settings };
  if (width && height) told.size = `${width} × ${height}`;
  const loras = Object.entries(record.body.loras ?? {});
  if (loras.length) told.adapters = loras.map(([name, weight]) => `${name} ${weight}`).join(", ");
  const rows = Object.entries(told)
    .filter(([name]) => !SHOWN_ELSEWHERE.has(name))
    .map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)])
    .filter(([, value]) => !MEANING_NOTHING.has(value))
    .map(([name, value]) => make("div", {}, make("dt", {}, label(name)), make("dd", {}, value)));
  return make("dl", {}, ...rows);
}

function label(name) {
  const words = NAMES[name] ?? name.replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}
