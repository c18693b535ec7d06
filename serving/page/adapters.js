// The adapters of a request: any of the server's, each with a weight.

import { byId, fillSelect, make } from "./elements.js";

/** The list of adapters of the form. */
export class Adapters {
  #list = byId("adapter-list");
  #add = byId("adapter-add");
  #names;
  #most;

  constructor(names, most) {
    this.#names = names;
    this.#most = most;
    byId("adapters").hidden = !names.length;
    this.#add.addEventListener("change", () => {
      if (!this.#add.value) return;
      this.#insert(this.#add.value, 1);
      this.#list.lastChild.querySelector("input").focus();
      this.#changed();
    });
    this.#offer();
  }

  /** Returns names with weights. */
  read() {
    const rows = [...this.#list.children];
    return Object.fromEntries(rows.map((row) => [row.dataset.name, row.querySelector("input").valueAsNumber]));
  }

  /** Shows names with weights, those that the server has. */
  use(weights) {
    this.#list.replaceChildren();
    for (const [name, weight] of Object.entries(weights)) {
      if (this.#names.includes(name)) this.#insert(name, weight);
    }
    this.#offer();
  }

  #insert(name, weight) {
    const id = `adapter-${name}`;
    const drop = () => {
      row.remove();
      this.#changed();
      this.#add.focus();
    };
    const row = make(
      "li",
      { class: "row", "data-name": name },
      make("label", { for: id }, name),
      make("input", { id, type: "number", min: -100, max: 100, step: "any", value: weight, required: true }),
      make("button", { type: "button", class: "quiet", "aria-label": `Remove ${name}`, onclick: drop }, "Remove"),
    );
    this.#list.append(row);
  }

  #changed() {
    this.#offer();
    this.#list.dispatchEvent(new Event("input", { bubbles: true }));
  }

  #offer() {
    const taken = this.read();
    const left = this.#names.filter((name) => !(name in taken));
    fillSelect(this.#add, [["", "Choose…"], ...left.map((name) => [name, name])]);
    this.#add.value = "";
    this.#add.disabled = !left.length || Object.keys(taken).length >= this.#most;
  }
}
