// Puts the parts of the page together: the list of conversations, the composer, keys, drawers.

import { ApiError, request } from "./api.js";
import { Chat } from "./chat.js";
import { Conversations } from "./conversations.js";
import { byId, complain, el, iconButton } from "./dom.js";
import { Settings } from "./settings.js";
import { machineDrawer, sidebarDrawer } from "./drawers.js";
import { MachinePanel } from "./machine.js";
import { theme } from "./theme.js";

const conversations = new Conversations();
const settings = new Settings(() => showState());
const chat = new Chat(conversations, settings, () => showState());
const sidebar = sidebarDrawer();
const message = byId("message");

function showState() {
  const { conversation, busy } = chat;
  const title = conversation.title || "New conversation";
  byId("title").textContent = title;
  document.title = conversation.title ? `${title} – flashmoe` : "flashmoe";
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("send").disabled = !message.value.trim();
  byId("system-state").textContent = conversation.system.trim() ? "System prompt: on" : "System prompt";
  byId("system-chip").classList.toggle("on", Boolean(conversation.system.trim()));
  byId("form-state").textContent = settings.summary();
  showList();
}

function showList() {
  const rows = conversations.list().map((one) => {
    const current = one === chat.conversation;
    const title = one.title || "New conversation";
    const open = el("button", {
      type: "button",
      class: chat.running.has(one.id) ? "open running" : "open",
      "aria-current": current ? "true" : null,
      onclick: () => go(one),
      text: title,
    });
    return el("li", {}, open, iconButton("delete", `Delete “${title}”`, (event) => remove(one, event.currentTarget)));
  });
  const list = byId("conversations");
  const focused = [...list.querySelectorAll("button")].indexOf(document.activeElement);
  list.replaceChildren(...rows);
  if (focused >= 0) list.querySelectorAll("button")[focused]?.focus();
}

/** The first press asks, the second one deletes. */
function remove(conversation, button) {
  if (!button.classList.contains("sure")) {
    button.classList.add("sure");
    button.setAttribute("aria-label", "Press again to delete");
    button.title = "Press again to delete";
    setTimeout(() => button.isConnected && showList(), 3000);
    return;
  }
  chat.remove(conversation.id);
}

function go(conversation) {
  chat.show(conversation);
  sidebar.close();
  message.focus();
}

function neighbour(step) {
  const list = conversations.list();
  const next = list[list.indexOf(chat.conversation) + step];
  if (next) go(next);
}

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight, innerHeight * 0.4)}px`;
  byId("send").disabled = !message.value.trim();
}

function send() {
  if (chat.send(message.value)) message.value = "";
  fitMessage();
}

const KEYS = {
  "alt+n": () => go(null),
  "alt+r": () => chat.again(),
  "alt+s": () => settings.open(chat.conversation),
  "alt+m": () => byId("toggle-machine").click(),
  "alt+arrowup": () => neighbour(-1),
  "alt+arrowdown": () => neighbour(1),
};
const BARE_KEYS = { "/": () => message.focus(), "?": () => byId("help").showModal() };

function onKey(event) {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && chat.busy) return chat.stop();
  const writing = event.target.closest("textarea, input, select");
  // By the key's place where Alt makes another letter of it, as on a Mac.
  const key = event.code.startsWith("Key") ? event.code.slice(3).toLowerCase() : event.key.toLowerCase();
  const plain = !(event.ctrlKey || event.metaKey || event.altKey || writing);
  const action = event.altKey && !event.ctrlKey ? KEYS[`alt+${key}`] : plain ? BARE_KEYS[event.key] : undefined;
  if (!action) return;
  event.preventDefault();
  action();
}

function wire() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  message.addEventListener("input", fitMessage);
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => {
    chat.stop();
    message.focus();
  });
  byId("new").addEventListener("click", () => go(null));
  byId("open-settings").addEventListener("click", () => settings.open(chat.conversation));
  byId("system-chip").addEventListener("click", () => settings.open(chat.conversation, "system"));
  byId("settings").addEventListener("close", () => {
    if (chat.conversation.messages.length) conversations.save(chat.conversation);
    showState();
  });
  byId("open-help").addEventListener("click", () => byId("help").showModal());
  for (const button of document.querySelectorAll("dialog [data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  document.addEventListener("keydown", onKey);
  window.addEventListener("pagehide", () => {
    for (const id of chat.running.keys()) if (conversations.all.has(id)) conversations.save(conversations.all.get(id));
  });
  conversations.follow(
    (id) => {
      if (id === chat.conversation.id) chat.show(conversations.all.get(id) ?? null);
      else showState();
    },
    (id) => chat.running.has(id),
  );
}

async function showModel() {
  try {
    const { data } = await (await request("/v1/models")).json();
    byId("model").textContent = data[0].id;
    byId("model").title = `context of ${data[0].context_length} tokens`;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    complain(error.message);
  }
}

wire();
const machine = new MachinePanel();
machineDrawer(machine);
theme(() => machine.recolour());
chat.show(conversations.list()[0] ?? null);
fitMessage();
message.focus();
showModel();
