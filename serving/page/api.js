// The server's native API: requests with the key, refusals as sentences, events as they come.

import { sentence } from "./elements.js";

const KEY = "latentrt.key";
const FIRST_PAUSE = 1000; // milliseconds before a server that is gone is asked again
const LONGEST_PAUSE = 8000;
const GATEWAY = new Set([502, 504]); // a proxy's word that there is no server behind it

/** What the server refuses, as a sentence; `param` is the field that it is about. */
export class Refusal extends Error {
  constructor(message, { status, code = "", param = null }) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

/** Nobody answers. */
export class Unreachable extends Error {
  constructor() {
    super("The server cannot be reached.");
  }
}

/** Tells "lost" when nobody answers any more, "found" when somebody does, and "key" for want of one. */
export const connection = new EventTarget();
let isLost = false;
let isLocked = false;

/** Whether asking is in vain now: nobody answered the last time, or a key is wanted. */
export function isCutOff() {
  return isLost || isLocked;
}

/** Takes the key of this tab, "" for none, and goes on with it. */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  isLocked = false;
  if (!isLost) connection.dispatchEvent(new Event("found"));
}

/** Whether this tab has a key. */
export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/** Asks the server. Throws a Refusal, Unreachable, or an AbortError. */
export async function ask(path, { method = "GET", body, headers = {}, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const sent = { ...headers };
  if (key !== null) sent.authorization = `Bearer ${key}`;
  if (body !== undefined) sent["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, body, headers: sent, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw lost();
  }
  if (answer.ok) return answer;
  if (GATEWAY.has(answer.status)) throw lost();
  const refusal = await refusalOf(answer);
  if (refusal.status === 401 && !isLocked) {
    isLocked = true;
    connection.dispatchEvent(new Event("key"));
  }
  throw refusal;
}

async function refusalOf(answer) {
  let told = {};
  try {
    told = (await answer.json()).error ?? {};
  } catch {
    // a proxy's page
  }
  const after = Number(answer.headers.get("retry-after"));
  const again = after ? ` Try again in ${after} s.` : "";
  const message = sentence(told.message ?? `the server answered with ${answer.status}`);
  return new Refusal(message + again, { status: answer.status, code: told.code, param: told.param });
}

function lost() {
  if (!isLost) {
    isLost = true;
    connection.dispatchEvent(new Event("lost"));
    lookAgain(FIRST_PAUSE);
  }
  return new Unreachable();
}

function lookAgain(pause) {
  setTimeout(async () => {
    try {
      if ((await fetch("/health", { cache: "no-store" })).ok) {
        isLost = false;
        connection.dispatchEvent(new Event("found"));
        return;
      }
    } catch {
      // still gone
    }
    lookAgain(Math.min(2 * pause, LONGEST_PAUSE));
  }, pause);
}

/** Yields a job's events, {name, number, data}, from one on, until the server ends them. */
export async function* events(path, { after, signal }) {
  const headers = after ? { "last-event-id": String(after) } : {};
  const answer = await ask(path, { headers, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Unreachable(); // whether the server is gone the next request tells
    }
    if (chunk.done) return;
    const blocks = (text + chunk.value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = readEvent(block);
      if (event.name) yield event;
    }
  }
}

function readEvent(block) {
  const event = { name: "", number: 0, data: {} };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    else if (line.startsWith("id: ")) event.number = Number(line.slice(4));
    else if (line.startsWith("data: ")) event.data = JSON.parse(line.slice(6));
  }
  return event;
}
