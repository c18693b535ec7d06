// The form: filled from what the server's capabilities say, read into the body of a request.

import { Adapters } from "./adapters.js";
import { byId, fillSelect } from "./elements.js";

const DRAFT = "latentrt.draft"; // what stands in the form, so that a reload finds it again
const LONGEST_ERROR_NAME = /^[a-z_.]+$/;

/** The settings of the next picture. */
export class RequestForm {
  #form = byId("request");
  #adapters;

  constructor(capabilities) {
    const { models, loras, samplers, schedules, presets, formats, upscalers, seamless, limits } = capabilities;
    const auto = (names) => [["", "auto"], ...names.map((name) => [name, name])];
    fillSelect(byId("model"), models.map((name) => [name, name]));
    byId("model-field").hidden = models.length < 2;
    fillSelect(byId("sampler"), auto(samplers));
    fillSelect(byId("schedule"), auto(schedules));
    fillSelect(byId("preset"), auto(presets));
    fillSelect(byId("hires.upscaler"), auto(upscalers));
    fillSelect(byId("seamless"), [["", "no"], ...seamless.map((name) => [name, name])]);
    fillSelect(byId("format"), formats.map((name) => [name, name.toUpperCase()]));
    for (const name of ["width", "height"]) byId(name).max = limits.side;
    byId("num_inference_steps").max = limits.steps;
    byId("num_images_per_prompt").max = limits.pictures;
    byId("prompt").maxLength = byId("negative_prompt").maxLength = limits.prompt_characters;
    this.#adapters = new Adapters(loras, limits.loras);
    this.#form.addEventListener("input", () => this.#keepDraft());
    byId("settings-reset").addEventListener("click", () => this.reset());
    this.#takeDraft();
  }

  /** Whether previews are wanted. */
  get previews() {
    return byId("previews").checked;
  }

  /** Whether all is within bounds; the first field that is not is told of and focused. */
  check() {
    for (const field of this.#form.elements) field.removeAttribute?.("aria-invalid");
    const wrong = [...this.#form.elements].find((field) => field.validity && !field.validity.valid);
    if (!wrong) return true;
    this.point(wrong.name || wrong.id);
    wrong.reportValidity();
    return false;
  }

  /** Returns the body of the request, without pictures. */
  read({ image = false, mask = false } = {}) {
    const body = {};
    for (const field of this.#fields()) {
      if (("image" in field.dataset && !image) || ("mask" in field.dataset && !mask)) continue;
      const value = valueOf(field);
      if (value === null) continue;
      const [name, part] = field.name.split(".");
      if (part) body[name] = { ...body[name], [part]: value };
      else body[name] = value;
    }
    if (body.hires && !body.hires.scale) delete body.hires;
    const loras = this.#adapters.read();
    if (Object.keys(loras).length) body.loras = loras;
    return body;
  }

  /** Shows the settings of a body; what it does not say is left to the model. */
  use(body) {
    this.#form.reset();
    for (const field of this.#fields()) {
      const [name, part] = field.name.split(".");
      const value = part ? body[name]?.[part] : body[name];
      if (value === undefined || value === null) continue;
      if (field.type === "checkbox") field.checked = Boolean(value);
      else field.value = String(value);
    }
    this.#adapters.use(body.loras ?? {});
    this.#keepDraft();
  }

  /** Takes all settings back, but the texts. */
  reset() {
    this.use({ prompt: byId("prompt").value, negative_prompt: byId("negative_prompt").value });
    byId("prompt").focus();
  }

  /** Leads to the field that a refusal names. */
  point(name) {
    const field = name && LONGEST_ERROR_NAME.test(name) ? byId(name) : null;
    if (!field || !this.#form.contains(field)) return;
    const details = field.closest("details");
    if (details) details.open = true;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }

  #fields() {
    return [...this.#form.elements].filter((field) => field.name && field.name !== "previews");
  }

  #keepDraft() {
    sessionStorage.setItem(DRAFT, JSON.stringify(this.read({ image: true, mask: true })));
  }

  #takeDraft() {
    const draft = sessionStorage.getItem(DRAFT);
    if (draft) this.use(JSON.parse(draft));
  }
}

function valueOf(field) {
  if (field.type === "checkbox") return field.checked || null;
  if (field.value === "") return field.name === "prompt" ? "" : null;
  const isNumber = field.type === "number" || field.name === "seed" || "number" in field.dataset;
  return isNumber ? Number(field.value) : field.value;
}
