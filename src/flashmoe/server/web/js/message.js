// How a message looks.

import { copyButton, el, icon, iconButton } from "./dom.js";
import { codeBlock, MarkdownView } from "./markdown.js";

const ROLES = { user: "You", assistant: "Model", tool: "Tool result" };

/**
 * One message.  actions: {again(), edit(text), result(call, text), answered(call)}; again is null where it cannot be
 * done.  update() shows what has changed.
 */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = el("div", { class: "body" });
    this.foot = el("div", { class: "message-foot" });
    this.node = el(
      "article",
      { class: `message ${message.role}`, "aria-label": ROLES[message.role] },
      message.role === "tool" ? null : el("h2", { class: "unseen", text: ROLES[message.role] }),
      this.body,
      this.foot,
    );
    this.update(false);
  }

  /** busy: the answer is still coming. */
  update(busy) {
    this.node.classList.toggle("busy", busy);
    this.node.setAttribute("aria-busy", String(busy));
    if (this.message.role === "user") this.#showUser();
    else if (this.message.role === "tool") this.#showResult();
    else this.#showAnswer(busy);
  }

  /** Once: what the user said does not change, and a change that is being written must not be lost. */
  #showUser(anew = false) {
    if (this.body.firstChild && !anew) return;
    this.body.replaceChildren(el("div", { class: "bubble", text: this.message.content }));
    this.foot.replaceChildren(
      copyButton("Copy this message", () => this.message.content),
      iconButton("edit", "Change this message and ask again", () => this.#edit()),
    );
  }

  #edit() {
    const area = el("textarea", { class: "edit", "aria-label": "Message", rows: Math.min(12, this.message.content.split("\n").length + 1) });
    area.value = this.message.content;
    const done = (send) => {
      if (send && area.value.trim()) this.actions.edit(area.value);
      else this.#showUser(true);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") done(false);
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) done(true);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.body.replaceChildren(area);
    this.foot.replaceChildren(
      el("button", { class: "plain", type: "button", onclick: () => done(false) }, "Cancel"),
      el("button", { class: "primary", type: "button", onclick: () => done(true) }, "Ask again"),
    );
    area.focus();
  }

  #showResult() {
    if (this.body.firstChild) return;
    const details = el("details", { class: "fold" }, el("summary", {}, icon("tool"), "Result"));
    details.append(jsonOf(this.message.content) ?? el("pre", { class: "result", text: this.message.content }));
    this.body.replaceChildren(details);
  }

  #showAnswer(busy) {
    const { message } = this;
    this.parts ??= this.#answerParts();
    const { reasoning, text, json, calls, waiting, problem } = this.parts;
    reasoning.update(message, busy);
    const shown = busy ? null : jsonOf(message.content);
    text.container.hidden = shown !== null || !message.content;
    json.hidden = shown === null;
    if (shown) json.replaceChildren(shown);
    else text.update(message.content);
    waiting.hidden = !busy || Boolean(message.content || message.reasoning || message.calls.length);
    problem.hidden = !message.problem;
    problem.textContent = message.problem ?? "";
    this.#showCalls(calls, busy);
    this.foot.replaceChildren(...(busy ? [] : this.#answerFoot()));
  }

  #answerParts() {
    const reasoning = new ReasoningView();
    const text = new MarkdownView(el("div", { class: "markdown" }));
    const json = el("div", { class: "json" });
    const calls = el("div", { class: "calls" });
    const waiting = el("div", { class: "waiting", "aria-hidden": "true" }, el("i"), el("i"), el("i"));
    const problem = el("p", { class: "problem" });
    this.body.append(waiting, reasoning.node, text.container, json, calls, problem);
    return { reasoning, text, json, calls, waiting, problem };
  }

  #showCalls(container, busy) {
    const { calls } = this.message;
    while (container.childElementCount > calls.length) container.lastElementChild.remove();
    calls.forEach((call, i) => {
      const answered = this.actions.answered?.(call) ?? true;
      const state = `${call.arguments.length}/${busy}/${answered}`;
      const old = container.children[i];
      if (old?.dataset.state === state) return;
      const node = this.#callCard(call, busy, answered);
      node.dataset.state = state;
      if (old) old.replaceWith(node);
      else container.append(node);
    });
  }

  #callCard(call, busy, answered) {
    const card = el("section", { class: "call", "aria-label": `Call of ${call.name}` });
    card.append(el("div", { class: "call-head" }, icon("tool"), el("strong", { text: call.name })), prettyCode(call.arguments));
    if (busy || answered || !this.actions.result) return card;
    const area = el("textarea", { rows: 2, class: "mono", "aria-label": `Result of ${call.name}`, placeholder: "What the tool answers" });
    const send = el("button", { class: "primary", type: "button", onclick: () => this.actions.result(call, area.value) }, "Give result");
    card.append(el("div", { class: "call-result" }, area, send));
    return card;
  }

  #answerFoot() {
    const { message } = this;
    const facts = factsOf(message);
    return [
      message.content ? copyButton("Copy this answer", () => message.content) : null,
      this.actions.again ? iconButton("again", "Answer once more (Alt R)", this.actions.again) : null,
      facts ? el("span", { class: "facts", text: facts }) : null,
    ].filter(Boolean);
  }
}

/** The model's reasoning, folded. */
class ReasoningView {
  constructor() {
    this.title = el("span");
    this.text = new MarkdownView(el("div", { class: "markdown" }));
    this.node = el("details", { class: "fold reasoning" }, el("summary", {}, this.title), this.text.container);
  }

  update(message, busy) {
    this.node.hidden = !message.reasoning.trim();
    if (this.node.hidden) return;
    const thinking = busy && !message.content && !message.calls.length;
    this.node.classList.toggle("thinking", thinking);
    const seconds = message.thought ? ` for ${message.thought.toFixed(1)} s` : "";
    this.title.textContent = thinking ? "Thinking…" : `Thought${seconds}`;
    this.text.update(message.reasoning);
  }
}

/** The text as indented JSON when it is an object or a list and nothing else, or null. */
function jsonOf(text) {
  if (!/^\s*[[{]/.test(text)) return null;
  try {
    return codeBlock(JSON.stringify(JSON.parse(text), null, 2), "JSON");
  } catch {
    return null;
  }
}

function prettyCode(text) {
  try {
    return el("pre", { tabindex: "0" }, el("code", { text: JSON.stringify(JSON.parse(text), null, 2) }));
  } catch {
    return el("pre", { tabindex: "0" }, el("code", { text })); // still coming
  }
}

function factsOf({ facts, finish, stopped }) {
  const words = [];
  if (stopped) words.push("stopped");
  if (finish === "length") words.push("cut at the longest answer");
  if (facts?.tokens) words.push(`${facts.tokens} tokens`);
  if (facts?.speed) words.push(`${facts.speed < 10 ? facts.speed.toFixed(1) : Math.round(facts.speed)} tok/s`);
  if (facts?.wait) words.push(`first after ${facts.wait.toFixed(facts.wait < 10 ? 1 : 0)} s`);
  if (facts?.cached) words.push(`${facts.cached} of ${facts.prompt} prompt tokens known`);
  return words.join(" · ");
}
