// Requests to this server: the key, errors as one line, server-sent events.

import { byId } from "./dom.js";

const KEY = "flashmoe.key";

/** An answer that is not the wanted one; status 0: there was none. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** POST `body` as JSON, or GET without one.  Asks for the key when the server does.  Throws ApiError, AbortError. */
export async function request(path, { body, signal } = {}) {
  let asked = false;
  for (;;) {
    const response = await send(path, body, signal);
    if (response.ok) return response;
    const message = await messageOf(response);
    if (response.status !== 401 || !(await askForKey(asked ? message : ""))) throw new ApiError(response.status, message);
    asked = true;
  }
}

async function send(path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const key = storedKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer: is flashmoe serve still running?");
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** The events of a streamed response: {name, data}, data parsed as JSON.  "[DONE]" ends it. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const event = parsed(part);
        if (event?.data === "[DONE]") return;
        if (event) yield { name: event.name, data: JSON.parse(event.data) };
      }
    }
  } finally {
    reader.cancel().catch(() => undefined); // it is closed already when the stream ended by itself
  }
}

function parsed(part) {
  let name = "message";
  const data = [];
  for (const line of part.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    else if (line.startsWith("data: ")) data.push(line.slice(6));
  }
  return data.length ? { name, data: data.join("\n") } : null;
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? memoryKey;
  } catch {
    return memoryKey;
  }
}

let memoryKey = "";

function storeKey(key, keep) {
  memoryKey = key;
  try {
    sessionStorage.setItem(KEY, key);
    if (keep) localStorage.setItem(KEY, key);
    else localStorage.removeItem(KEY);
  } catch {
    // Storage is forbidden: the key lives as long as this page.
  }
}

let asking = null;

/** Resolves to true when there is a new key to try.  Requests that need one at the same time share the question. */
function askForKey(problem) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    let given = false;
    byId("key-problem").textContent = problem && "That one was wrong.";
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      given = true;
      storeKey(byId("key").value, byId("key-keep").checked);
      dialog.close();
    };
    dialog.onclose = () => {
      asking = null;
      byId("key").value = "";
      resolve(given);
    };
    dialog.showModal();
  });
  return asking;
}
