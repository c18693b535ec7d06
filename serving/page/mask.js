// The mask over a picture: strokes of a round brush, painted or erased, with mouse, pen, finger or
// keys. It has the picture's own pixels, whatever size it is shown in.

import { byId, say } from "./elements.js";
import { maskFile } from "./png.js";

const COLOUR = [226, 20, 110, 150]; // of what is painted, over the picture
const UNDO_BYTES = 32 * 2 ** 20; // of former masks
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** The mask of the page's form. */
export class Mask {
  #canvas = byId("mask");
  #brush = byId("mask-brush");
  #size = byId("mask-size");
  #eraser = byId("mask-erase");
  #context = this.#canvas.getContext("2d");
  #painted = new Uint8Array();
  #former = [];
  #at = { x: 0, y: 0 };
  #painting = false;

  constructor() {
    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(name, () => (this.#painting = false));
    }
    canvas.addEventListener("pointerleave", () => (this.#brush.hidden = true));
    canvas.addEventListener("keydown", (event) => this.#press(event));
    canvas.addEventListener("focus", () => this.#showBrush());
    canvas.addEventListener("blur", () => (this.#brush.hidden = true));
    this.#size.addEventListener("input", () => this.#showBrush());
    this.#eraser.addEventListener("click", () => this.#toggleEraser());
    byId("mask-undo").addEventListener("click", () => this.#undo());
    byId("mask-invert").addEventListener("click", () => this.#change(() => this.#invert()));
    byId("mask-clear").addEventListener("click", () => this.#change(() => this.#painted.fill(0)));
    this.#brush.hidden = true;
  }

  /** Begins anew over a picture of a size in pixels. */
  reset(width, height) {
    Object.assign(this.#canvas, { width, height });
    this.#painted = new Uint8Array(width * height);
    this.#former = [];
    this.#at = { x: width / 2, y: height / 2 };
    this.#size.max = String(Math.max(Math.round(Math.min(width, height) / 4), 1));
    this.#size.value = String(Math.max(Math.round(Math.min(width, height) / 12), 1));
  }

  /** Takes the mask of a former request, a Blob of the same size. */
  async use(file) {
    const { width, height } = this.#canvas;
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.drawImage(await createImageBitmap(file), 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    this.#painted.forEach((_, at) => (this.#painted[at] = data[4 * at] > 127 ? 1 : 0));
    this.#drawAll();
  }

  /** Whether nothing is painted. */
  get isEmpty() {
    return !this.#painted.includes(1);
  }

  /** Returns the mask's file. */
  file() {
    return maskFile(this.#painted, this.#canvas.width, this.#canvas.height);
  }

  get #radius() {
    return Number(this.#size.value);
  }

  /** Where an event is, in the picture's pixels. */
  #place(event) {
    const shown = this.#canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - shown.left) * this.#canvas.width) / shown.width,
      y: ((event.clientY - shown.top) * this.#canvas.height) / shown.height,
    };
  }

  #begin(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.#canvas.focus({ preventScroll: true });
    this.#canvas.setPointerCapture(event.pointerId);
    this.#painting = true;
    this.#keepFormer();
    this.#at = this.#place(event);
    this.#stroke(this.#at, this.#at);
  }

  #move(event) {
    if (this.#painting) {
      const passed = event.getCoalescedEvents?.() ?? [];
      for (const each of passed.length ? passed : [event]) {
        const to = this.#place(each);
        this.#stroke(this.#at, to);
        this.#at = to;
      }
    } else this.#at = this.#place(event);
    this.#showBrush();
  }

  #press(event) {
    const { width, height } = this.#canvas;
    if (event.key === " ") {
      this.#keepFormer();
      this.#stroke(this.#at, this.#at);
    } else if (event.key in ARROWS) {
      const far = Math.max(this.#radius / 2, 1);
      const [x, y] = ARROWS[event.key].map((sign) => sign * far);
      const within = (value, most) => Math.min(Math.max(value, 0), most);
      const to = { x: within(this.#at.x + x, width), y: within(this.#at.y + y, height) };
      if (event.shiftKey) {
        this.#keepFormer();
        this.#stroke(this.#at, to);
      }
      this.#at = to;
    } else return;
    event.preventDefault();
    this.#showBrush();
    const share = (value, most) => Math.round((100 * value) / most);
    say(`${share(this.#at.x, width)}% from the left, ${share(this.#at.y, height)}% from the top`);
  }

  /** Sets or clears every pixel whose centre is within the brush on its way. */
  #stroke(from, to) {
    const { width, height } = this.#canvas;
    const radius = this.#radius;
    const value = this.#eraser.getAttribute("aria-pressed") === "true" ? 0 : 1;
    const left = Math.max(Math.floor(Math.min(from.x, to.x) - radius), 0);
    const right = Math.min(Math.ceil(Math.max(from.x, to.x) + radius), width);
    const top = Math.max(Math.floor(Math.min(from.y, to.y) - radius), 0);
    const bottom = Math.min(Math.ceil(Math.max(from.y, to.y) + radius), height);
    const [along, down] = [to.x - from.x, to.y - from.y];
    const length = along ** 2 + down ** 2;
    for (let y = top; y < bottom; y += 1) {
      for (let x = left; x < right; x += 1) {
        const [beside, below] = [x + 0.5 - from.x, y + 0.5 - from.y];
        const part = length ? (beside * along + below * down) / length : 0;
        const nearest = Math.min(Math.max(part, 0), 1);
        const distance = (beside - nearest * along) ** 2 + (below - nearest * down) ** 2;
        if (distance <= radius ** 2) this.#painted[y * width + x] = value;
      }
    }
    this.#draw(left, top, right - left, bottom - top);
  }

  #draw(left, top, width, height) {
    if (width <= 0 || height <= 0) return;
    const shown = this.#context.createImageData(width, height);
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) {
        const at = (top + y) * this.#canvas.width + left + x;
        if (this.#painted[at]) shown.data.set(COLOUR, 4 * (y * width + x));
      }
    }
    this.#context.putImageData(shown, left, top);
  }

  #drawAll() {
    this.#draw(0, 0, this.#canvas.width, this.#canvas.height);
  }

  #change(act) {
    this.#keepFormer();
    act();
    this.#drawAll();
  }

  #invert() {
    this.#painted.forEach((value, at) => (this.#painted[at] = 1 - value));
  }

  #keepFormer() {
    this.#former.push(this.#painted.slice());
    if (this.#former.length * this.#painted.length > UNDO_BYTES) this.#former.shift();
  }

  #undo() {
    this.#painted = this.#former.pop() ?? this.#painted;
    this.#drawAll();
  }

  #toggleEraser() {
    const pressed = this.#eraser.getAttribute("aria-pressed") !== "true";
    this.#eraser.setAttribute("aria-pressed", String(pressed));
  }

  #showBrush() {
    const { width, height } = this.#canvas;
    const { style } = this.#brush;
    this.#brush.hidden = document.activeElement !== this.#canvas && !this.#canvas.matches(":hover");
    style.left = `${(100 * this.#at.x) / width}%`;
    style.top = `${(100 * this.#at.y) / height}%`;
    style.width = `${(200 * this.#radius) / width}%`;
    style.aspectRatio = "1";
  }
}
