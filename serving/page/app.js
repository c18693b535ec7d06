// The page's beginning: what the server is capable of, and who does what.

import { Refusal, ask, connection, hasKey, setKey } from "./api.js";
import { Details } from "./details.js";
import { byId, hideProblem, say, sentence, showProblem } from "./elements.js";
import { RequestForm } from "./form.js";
import { Gallery } from "./gallery.js";
import { Jobs, bodyAgain, isUnfinished } from "./jobs.js";
import { Source } from "./source.js";
import { Store } from "./store.js";

const NOTHING_TO_DRAW = "Write what is to be drawn, or start from a picture.";
let form;
let source;
let jobs;

/** Does something, and says in a sentence what is in its way. */
async function run(act) {
  hideProblem();
  try {
    await act();
  } catch (error) {
    problem(error);
  }
}

function problem(error) {
  if (error instanceof Refusal && error.status === 401) return; // the key is asked for
  showProblem(sentence(error.message));
  if (error instanceof Refusal) form?.point(error.param);
}

async function draw() {
  if (!form.check()) return;
  const mask = await source.mask();
  const { image } = source;
  const body = form.read({ image: image !== null, mask: mask !== null });
  if (!body.prompt.trim() && !image) {
    form.point("prompt");
    throw new Error(NOTHING_TO_DRAW);
  }
  await begin(body, image, mask);
}

async function begin(body, image, mask) {
  const record = await jobs.begin(body, image, mask, form.previews);
  say("The request is sent.");
  gallery.show(record).element.scrollIntoView({ block: "nearest" });
}

const actions = {
  run,
  open: (record, index) => details.open(record, index),
  again: (record, index = null) => begin(bodyAgain(record, index), record.image, record.mask),
  cancel: (record) => jobs.cancel(record),
  remove: (record) => jobs.remove(record),
  use: async (record, index = 0) => {
    const seed = record.pictures[index]?.seed;
    form.use({ ...record.body, seed });
    await source.use(record.image, record.mask);
    byId("prompt").focus();
    say("The settings are in the form.");
  },
  start: async (file) => {
    await source.choose(file);
    byId("source").scrollIntoView({ block: "nearest" });
    byId("strength").focus();
    say("The picture is in the form.");
  },
};
const gallery = new Gallery(actions);
const details = new Details(actions);

function askForKey() {
  byId("key-change").hidden = false;
  if (byId("key").open) return;
  byId("key-problem").textContent = hasKey() ? "The server does not know that key." : "";
  byId("key-value").value = "";
  byId("key").showModal();
}

function useKey(event) {
  event.preventDefault();
  const key = byId("key-value").value.trim();
  byId("key-problem").textContent = key ? "" : "Type the key.";
  if (!key) return;
  byId("key").close();
  setKey(key);
}

async function start() {
  let capabilities;
  try {
    capabilities = await (await ask("/api/v1/capabilities")).json();
  } catch (error) {
    if (error instanceof Refusal) problem(error);
    return; // "found" and a key begin anew
  }
  if (form) return;
  byId("key-change").hidden = !hasKey();
  form = new RequestForm(capabilities);
  source = new Source(capabilities.limits);
  byId("draw").disabled = false;
  const shown = { show: (record) => gallery.show(record), gone: (record) => gallery.remove(record) };
  jobs = new Jobs(await Store.open(), { ...shown, problem });
  await jobs.load();
}

async function removeAll() {
  if (!window.confirm("Remove all pictures from this browser?")) return;
  const removing = [...jobs.records.values()].map((record) => jobs.remove(record));
  const failed = (await Promise.allSettled(removing)).find(({ reason }) => reason);
  if (failed) throw failed.reason;
}

byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  if (form) run(draw);
});
byId("request").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form) {
    event.preventDefault();
    run(draw);
  }
});
byId("clear").addEventListener("click", () => run(removeAll));
byId("key-form").addEventListener("submit", useKey);
byId("key-close").addEventListener("click", () => byId("key").close());
byId("key-change").addEventListener("click", askForKey);
connection.addEventListener("key", askForKey);
connection.addEventListener("lost", () => {
  byId("connection").textContent = "The server cannot be reached. Trying again…";
});
connection.addEventListener("found", () => {
  byId("connection").textContent = "";
  if (!form) start();
});
start();
