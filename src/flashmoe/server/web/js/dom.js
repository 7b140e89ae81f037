// Building elements.  Texts become text nodes, always: nothing here (or elsewhere) parses HTML.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * An element.  props: "class", "on<event>" (a function), "text", data-*, aria-* and other attributes; null, undefined
 * and false leave an attribute out.  children: nodes, texts, or null for none.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the symbols of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon and says `label`. */
export function iconButton(name, label, onclick, props = {}) {
  return el("button", { class: "icon small", type: "button", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

/** A button that copies what text() gives, and says that it did. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const done = await copy(text());
    button.replaceChildren(icon(done ? "done" : "close"));
    announce(done ? "Copied" : "The browser refuses to copy");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text); // over plain HTTP from another machine there is no clipboard object
  }
}

function copySelected(text) {
  const area = el("textarea", { class: "unseen" });
  area.value = text;
  document.body.append(area);
  const before = document.activeElement;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  return done;
}

/** Say something to screen readers. */
export function announce(text) {
  byId("status").textContent = text;
}

let toastTimer = 0;

/** Show a problem for a while. */
export function complain(text) {
  const toast = byId("toast");
  toast.textContent = text;
  toast.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (toast.hidden = true), 8000);
}
