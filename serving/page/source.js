// The picture to start from: chosen, dropped or pasted, shrunk to what the server takes, and the
// mask over it.

import { byId, showProblem } from "./elements.js";
import { Mask } from "./mask.js";

const SENT_AS_THEY_ARE = new Set(["image/png", "image/jpeg", "image/webp"]);
const BESIDE = 2 ** 16; // bytes of a body beside its pictures, about
const MULTIPLE = 8; // pixels, of a picture that is shrunk

/** The picture to start from, of the page's form. */
export class Source {
  #limits;
  #mask = new Mask();
  #file = null; // as it was chosen
  #bitmap = null;
  #sent = null; // as it is sent
  #url = null;
  #ready = Promise.resolve(); // once what was chosen last is what is sent

  constructor(limits) {
    this.#limits = limits;
    const input = byId("source-file");
    input.addEventListener("change", () => input.files[0] && this.choose(input.files[0]));
    byId("source-remove").addEventListener("click", () => this.remove());
    byId("source-longest").addEventListener("change", ({ target }) => {
      this.#ready = this.#shrink(target.valueAsNumber);
    });
    byId("mask-on").addEventListener("change", () => this.#showMask());
    document.addEventListener("paste", (event) => this.#receive(event, event.clipboardData));
    for (const name of ["dragover", "drop"]) {
      document.addEventListener(name, (event) => this.#receiveDropped(event));
    }
  }

  /** Takes a file; says so if it is no picture. */
  choose(file) {
    this.#ready = this.#choose(file);
    return this.#ready;
  }

  async #choose(file) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(file); // turned as its camera says, as the server turns it
    } catch {
      showProblem("That file is no picture that this browser can read; choose a PNG, JPEG or WebP.");
      byId("source-file").value = "";
      return;
    }
    this.#bitmap?.close();
    this.#file = file;
    this.#bitmap = bitmap;
    showChosen(file);
    byId("source-longest").max = Math.min(this.#limits.side, Math.max(bitmap.width, bitmap.height));
    byId("mask-on").checked = false;
    byId("source-chosen").hidden = false;
    await this.#shrink(Infinity);
  }

  /** Starts from no picture. */
  remove() {
    this.#bitmap?.close();
    this.#bitmap = this.#file = this.#sent = null;
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = null;
    byId("source-file").value = "";
    byId("source-chosen").hidden = true;
    byId("source-file").focus();
  }

  /** Takes the picture and the mask of a former request; null for none. */
  async use(image, mask) {
    if (!image) {
      if (this.#sent) this.remove();
      return;
    }
    await this.choose(image);
    if (!mask) return;
    byId("mask-on").checked = true;
    this.#showMask();
    await this.#mask.use(mask);
  }

  /** Returns the picture as a Blob, null for none. */
  get image() {
    return this.#sent;
  }

  /** Whether a mask is wanted. */
  get isMasked() {
    return this.#sent !== null && byId("mask-on").checked;
  }

  /**
   * Returns the mask as a Blob, null for none. Throws an Error where nothing is painted, or where
   * the server would break off while it is sent.
   */
  async mask() {
    await this.#ready;
    if (((this.#sent?.size ?? 0) * 4) / 3 + BESIDE > this.#limits.body_bytes) {
      throw new Error("The picture's file is too large to be sent; give a smaller longest side.");
    }
    if (!this.isMasked) return null;
    if (this.#mask.isEmpty) throw new Error("Nothing is painted in the mask; paint what is to change.");
    return this.#mask.file();
  }

  #receiveDropped(event) {
    if (!event.dataTransfer.types.includes("Files")) return; // texts go where they are dropped
    event.preventDefault(); // the browser would leave the page for the picture
    if (event.type === "drop") this.#receive(event, event.dataTransfer);
  }

  #receive(event, data) {
    const file = [...(data?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    this.choose(file);
  }

  /** Makes what is sent: the file itself where it fits, else a smaller picture of it. */
  async #shrink(longest) {
    const { width, height } = this.#bitmap;
    const { side, pixels } = this.#limits;
    const most = Math.min(Number.isFinite(longest) ? longest : side, side);
    const scale = Math.min(1, most / Math.max(width, height), Math.sqrt(pixels / (width * height)));
    let size = [width, height];
    if (scale === 1 && SENT_AS_THEY_ARE.has(this.#file.type)) this.#sent = this.#file;
    else {
      size = size.map((length) => Math.max(Math.floor((length * scale) / MULTIPLE), 1) * MULTIPLE);
      this.#sent = await drawn(this.#bitmap, ...size);
    }
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = URL.createObjectURL(this.#sent);
    byId("mask-image").src = this.#url;
    byId("source-longest").value = Math.max(...size);
    byId("source-size").textContent = `${size[0]} × ${size[1]} pixels`;
    this.#mask.reset(...size);
    this.#showMask();
  }

  #showMask() {
    byId("mask-editor").hidden = !byId("mask-on").checked;
  }
}

/** Lets the input say which file it is, wherever that came from. */
function showChosen(file) {
  const files = new DataTransfer();
  files.items.add(file instanceof File ? file : new File([file], "picture", { type: file.type }));
  byId("source-file").files = files.files;
}

function drawn(bitmap, width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
