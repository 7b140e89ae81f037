// The conversation in the middle of the page: shows it, asks, stops.

import { answer, emptyAnswer } from "./answer.js";
import { announce, byId, complain, el } from "./dom.js";
import { MessageView } from "./message.js";

const EXAMPLES = [
  "Tell me a short story about a brave mouse.",
  "Write a short poem about the sea.",
  "Explain how a mixture of experts works.",
];
const NEAR_BOTTOM = 80; // pixels in which the log still counts as scrolled to its end
const SAVE_MS = 2000; // a growing answer is stored so often: closing the window loses little

/** Shows one conversation; answers of others go on in the background.  changed() after anything a list would show. */
export class Chat {
  constructor(conversations, settings, changed) {
    Object.assign(this, { conversations, settings, changed });
    this.running = new Map(); // conversation id -> AbortController
    this.views = [];
    this.conversation = conversations.create();
    this.drawing = 0;
    byId("scroll").addEventListener("scroll", () => this.#showNewest(), { passive: true });
    byId("newest").addEventListener("click", () => this.#toEnd());
    new ResizeObserver(() => this.#showNewest()).observe(byId("log"));
  }

  /** Whether the shown conversation is being answered. */
  get busy() {
    return this.running.has(this.conversation.id);
  }

  /** Show another conversation, or a new one. */
  show(conversation) {
    this.conversation = conversation ?? this.conversations.create();
    this.#rebuild();
    this.#toEnd();
    this.changed();
  }

  /** Ask something. */
  send(text) {
    if (this.busy || !text.trim()) return false;
    this.conversation.messages.push({ role: "user", content: text });
    return this.#answer();
  }

  /** Stop the answer of the shown conversation. */
  stop() {
    this.running.get(this.conversation.id)?.abort();
  }

  /** Stop and forget a conversation. */
  remove(id) {
    this.running.get(id)?.abort();
    this.conversations.remove(id);
    if (id === this.conversation.id) this.show(null);
    this.changed();
  }

  /** Answer the last question once more. */
  again() {
    const { messages } = this.conversation;
    if (this.busy || !messages.length) return;
    while (messages.at(-1)?.role === "assistant") messages.pop();
    if (messages.length) this.#answer();
  }

  #edit(message, text) {
    if (this.busy) return;
    const { messages } = this.conversation;
    messages.splice(messages.indexOf(message), messages.length, { role: "user", content: text });
    this.#answer();
  }

  #giveResult(message, call, text) {
    if (this.busy) return;
    this.conversation.messages.push({ role: "tool", call: call.id, content: text });
    if (message.calls.every((one) => this.#answered(one))) this.#answer();
    else this.#stored();
  }

  #answered(call) {
    return this.conversation.messages.some((message) => message.role === "tool" && message.call === call.id);
  }

  /** Let the model answer what stands there.  False when the settings do not allow a request. */
  #answer() {
    const { conversation } = this;
    let fields;
    try {
      fields = this.settings.fields();
    } catch (error) {
      complain(error.message);
      this.settings.open(conversation);
      this.#stored();
      return true;
    }
    const message = emptyAnswer();
    const asked = { ...conversation, messages: [...conversation.messages] };
    conversation.messages.push(message);
    conversation.updated = Date.now();
    const control = new AbortController();
    this.running.set(conversation.id, control);
    this.#stored();
    this.#toEnd();
    announce("The answer begins");
    this.#follow(conversation, asked, message, fields, control.signal);
    return true;
  }

  async #follow(conversation, asked, message, fields, signal) {
    let saved = performance.now();
    await answer(asked, message, fields, signal, () => {
      if (performance.now() - saved > SAVE_MS && this.conversations.all.has(conversation.id)) {
        saved = performance.now();
        this.conversations.save(conversation);
      }
      if (conversation === this.conversation) this.#draw(message);
    });
    this.running.delete(conversation.id);
    if (this.conversations.all.has(conversation.id)) this.conversations.save(conversation);
    if (conversation === this.conversation) this.#rebuild();
    announce(ending(message));
    this.changed();
  }

  /** At most one drawing for each frame, however fast tokens come. */
  #draw(message) {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      const view = this.views.find((one) => one.message === message);
      if (!view) return;
      const atEnd = this.#atEnd();
      view.update(this.busy);
      if (atEnd) this.#toEnd();
    });
  }

  #stored() {
    this.conversations.save(this.conversation);
    this.#rebuild();
    this.changed();
  }

  /** Views of all messages; those that are there already stay. */
  #rebuild() {
    const { messages } = this.conversation;
    const known = new Map(this.views.map((view) => [view.message, view]));
    const atEnd = this.#atEnd();
    this.views = messages.map((message) => {
      const view = known.get(message) ?? new MessageView(message, this.#actions(message));
      view.actions.again = message === messages.at(-1) && message.role === "assistant" ? () => this.again() : null;
      view.update(this.busy && message === messages.at(-1));
      return view;
    });
    const nodes = messages.length ? this.views.map((view) => view.node) : [this.#welcome()];
    const log = byId("log");
    for (const child of [...log.children]) if (!nodes.includes(child)) child.remove();
    nodes.forEach((node, i) => {
      if (log.children[i] !== node) log.insertBefore(node, log.children[i] ?? null);
    });
    if (atEnd) this.#toEnd();
  }

  #actions(message) {
    return {
      again: null,
      edit: (text) => this.#edit(message, text),
      result: (call, text) => this.#giveResult(message, call, text),
      answered: (call) => this.#answered(call),
    };
  }

  #welcome() {
    const ask = (text) => el("button", { type: "button", class: "example", onclick: () => this.send(text), text });
    return el(
      "div",
      { class: "welcome" },
      el("img", { src: "/page/icon.svg", alt: "", width: 44, height: 44 }),
      el("h2", { text: "What would you like to know?" }),
      el("p", { text: "The model runs on this machine. Its experts come from the drive when they are needed." }),
      el("div", { class: "examples" }, EXAMPLES.map(ask)),
    );
  }

  #atEnd() {
    const scroll = byId("scroll");
    return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_BOTTOM;
  }

  #toEnd() {
    const scroll = byId("scroll");
    scroll.scrollTop = scroll.scrollHeight;
    this.#showNewest();
  }

  #showNewest() {
    byId("newest").hidden = this.#atEnd();
  }
}

function ending(message) {
  if (message.problem) return `The answer failed: ${message.problem}`;
  if (message.stopped) return "The answer was stopped";
  return `The answer is complete: ${message.content.slice(0, 2000)}`;
}
