// What is asked of the model besides the conversation: sampling, thinking, the form of an answer, tools.

import { byId, complain, el } from "./dom.js";

const STORED = "flashmoe.settings";

// [name in a request, label, smallest, largest, step, what it does]
const NUMBERS = [
  ["temperature", "Temperature", 0, 5, 0.05, "0 always takes the likeliest token"],
  ["top_p", "Top p", 0.01, 1, 0.01, "of the likeliest, this share"],
  ["top_k", "Top k", 0, 1000, 1, "of the likeliest, so many; 0 for all"],
  ["min_p", "Min p", 0, 1, 0.01, "none below this share of the likeliest"],
  ["max_tokens", "Longest answer", 1, 1000000, 1, "tokens"],
  ["seed", "Seed", 0, 4294967295, 1, "the same one, the same answer"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "against what was said"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "against what was said often"],
  ["repetition_penalty", "Repetition penalty", 0.1, 5, 0.05, "1 for none"],
];
const CHOICES = {
  thinking: ["Thinking", { "": "as the model does", on: "on", off: "off" }],
  form: ["Form of the answer", { "": "text", json: "a JSON object", schema: "JSON by a schema" }],
  tool_choice: ["Calling tools", { "": "if the model wants to", required: "always", none: "never" }],
};
const TEXTS = {
  schema: ["JSON Schema", '{"type": "object", "properties": …}'],
  tools: ["Tools", '[{"type": "function", "function": {"name": …, "parameters": …}}]'],
};

/** The settings of this browser, their dialog, and what they add to a request. */
export class Settings {
  constructor(changed) {
    this.values = stored();
    this.changed = changed;
    this.conversation = null;
    this.#build();
    byId("defaults").addEventListener("click", () => this.#clear());
  }

  /** Open the dialog for a conversation, whose system prompt it edits too. */
  open(conversation, field = null) {
    this.conversation = conversation;
    this.#show();
    byId("settings").showModal();
    if (field) byId(`set-${field}`).focus();
  }

  /** Fields of a request.  Throws Error with one line when a JSON text cannot be used. */
  fields() {
    const { values } = this;
    const fields = {};
    for (const [name] of NUMBERS) if (values[name] !== undefined) fields[name] = values[name];
    if (values.thinking) fields.chat_template_kwargs = { enable_thinking: values.thinking === "on" };
    if (values.form === "json") fields.response_format = { type: "json_object" };
    if (values.form === "schema") {
      const schema = parse("JSON Schema", values.schema);
      fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
    }
    if (values.tools?.trim() && values.tool_choice !== "none") {
      fields.tools = parse("Tools", values.tools);
      if (values.tool_choice) fields.tool_choice = values.tool_choice;
    }
    return fields;
  }

  /** A few words on what differs from a plain text answer. */
  summary() {
    const words = [];
    if (this.values.form) words.push(this.values.form === "json" ? "JSON" : "JSON Schema");
    if (this.values.tools?.trim() && this.values.tool_choice !== "none") words.push("tools");
    return words.join(", ");
  }

  #build() {
    const field = (name, label, control, note, wide) => {
      control.id = `set-${name}`;
      control.addEventListener("input", () => this.#take(name, control));
      const small = el("small", { id: `note-${name}`, text: note ?? "" });
      control.setAttribute("aria-describedby", small.id);
      return el("div", { class: wide ? "field wide" : "field" }, el("label", { for: control.id, text: label }), control, small);
    };
    const number = ([name, label, min, max, step, note]) =>
      field(name, label, el("input", { type: "number", min, max, step, placeholder: "model’s default" }), note);
    const choice = (name) => {
      const [label, options] = CHOICES[name];
      return field(name, label, el("select", {}, Object.entries(options).map(([value, text]) => el("option", { value, text }))));
    };
    const text = (name) => {
      const [label, example] = TEXTS[name];
      return field(name, label, el("textarea", { rows: 4, spellcheck: "false", class: "mono", placeholder: example }), "", true);
    };
    const system = el("textarea", { rows: 3, placeholder: "You are…" });
    const group = (title, ...children) => el("fieldset", {}, el("legend", { text: title }), children);
    byId("fields").append(
      group("This conversation", field("system", "System prompt", system, "comes before everything else", true)),
      group("Sampling", NUMBERS.map(number)),
      group("Answers", choice("thinking"), choice("form"), text("schema")),
      group("Tools", choice("tool_choice"), text("tools")),
    );
  }

  #show() {
    for (const name of [...NUMBERS.map(([name]) => name), ...Object.keys(CHOICES), ...Object.keys(TEXTS)]) {
      byId(`set-${name}`).value = this.values[name] ?? "";
    }
    byId("set-system").value = this.conversation.system;
    this.#check();
  }

  #take(name, control) {
    if (name === "system") this.conversation.system = control.value;
    else if (control.type === "number") {
      if (!control.checkValidity()) return control.classList.add("wrong");
      control.classList.remove("wrong");
      this.values[name] = control.value === "" ? undefined : Number(control.value);
    } else this.values[name] = control.value || undefined;
    this.#check();
    store(this.values);
    this.changed();
  }

  #check() {
    byId("set-schema").closest(".field").hidden = this.values.form !== "schema";
    for (const name of Object.keys(TEXTS)) {
      let problem = "";
      try {
        if (this.values[name]?.trim()) parse(TEXTS[name][0], this.values[name]);
      } catch (error) {
        problem = error.message;
      }
      byId(`note-${name}`).textContent = problem;
      byId(`set-${name}`).classList.toggle("wrong", problem !== "");
    }
  }

  #clear() {
    this.values = {};
    store(this.values);
    for (const input of byId("fields").querySelectorAll(".wrong")) input.classList.remove("wrong");
    this.#show();
    this.changed();
  }
}

function parse(label, text) {
  try {
    return JSON.parse(text || "");
  } catch (error) {
    throw new Error(`${label}: ${error.message}`);
  }
}

function stored() {
  try {
    const values = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    return typeof values === "object" && values !== null ? values : {};
  } catch {
    return {};
  }
}

function store(values) {
  try {
    localStorage.setItem(STORED, JSON.stringify(values));
  } catch {
    complain("The browser does not keep these settings: they are lost with this page.");
  }
}
