// Conversations, kept in this browser: one key of localStorage each, so that two windows do not overwrite each other's.

import { complain } from "./dom.js";

const PREFIX = "flashmoe.conversation.";
const TITLE_LENGTH = 60;

/**
 * A conversation: {id, title, updated (ms), system, messages}.
 * A message: {role: "user" | "assistant" | "tool", content}; of the assistant also reasoning, calls [{id, name,
 * arguments}], facts about its making, problem, and stopped; of a tool also call (the id).
 */
export class Conversations {
  constructor() {
    this.all = new Map();
    for (const [id, text] of storedTexts()) this.#take(id, text);
  }

  /** Newest first. */
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  /** A new one; it is stored with its first message. */
  create(system = "") {
    return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", updated: Date.now(), system, messages: [] };
  }

  /** Store one. */
  save(conversation) {
    conversation.title = titleOf(conversation);
    this.all.set(conversation.id, conversation);
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    } catch {
      complain("The browser has no room for this conversation: delete older ones, or it is lost with this page.");
    }
  }

  /** Forget one. */
  remove(id) {
    this.all.delete(id);
    try {
      localStorage.removeItem(PREFIX + id);
    } catch {
      // Nothing was stored.
    }
  }

  /** Calls changed(id) when another window has stored or removed one; `busy` says which are being written here. */
  follow(changed, busy) {
    window.addEventListener("storage", (event) => {
      if (!event.key?.startsWith(PREFIX)) return;
      const id = event.key.slice(PREFIX.length);
      if (busy(id)) return;
      if (event.newValue === null) this.all.delete(id);
      else this.#take(id, event.newValue);
      changed(id);
    });
  }

  #take(id, text) {
    try {
      const value = JSON.parse(text);
      if (value.id === id && Array.isArray(value.messages)) this.all.set(id, value);
    } catch {
      complain("A stored conversation cannot be read and is left out.");
    }
  }
}

function* storedTexts() {
  try {
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith(PREFIX)) yield [key.slice(PREFIX.length), localStorage.getItem(key)];
    }
  } catch {
    complain("The browser forbids storage: conversations are lost with this page.");
  }
}

function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}
