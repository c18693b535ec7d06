// Elements and texts. Whatever a person or a server has written becomes a text node, never markup.

/** Finds an element of the page by its id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Makes an element: `onclick` and the like are listeners, true and false set and leave out an
 * attribute, and children that are strings are text.
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** Puts options into a select, keeping what is chosen where it is still there. */
export function fillSelect(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => value === before)) select.value = before;
}

/** Tells a screen reader what happened, without moving anybody. */
export function say(text) {
  byId("said").textContent = text;
}

/** Shows what went wrong until it is dismissed or something goes right. */
export function showProblem(text) {
  const dismiss = make("button", { type: "button", class: "quiet", onclick: hideProblem }, "Dismiss");
  byId("problem").replaceChildren(make("p", {}, text), dismiss);
}

/** Takes the last problem away. */
export function hideProblem() {
  byId("problem").replaceChildren();
}

/** Writes a text as a sentence: a capital first, a full stop last. */
export function sentence(text) {
  const trimmed = text.trim();
  const ended = /[.!?]$/.test(trimmed) ? trimmed : `${trimmed}.`;
  return ended.charAt(0).toUpperCase() + ended.slice(1);
}
