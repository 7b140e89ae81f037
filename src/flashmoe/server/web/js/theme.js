// Light, dark, or as the system has it.

import { announce, byId } from "./dom.js";

const ORDER = ["system", "light", "dark"];

/** Wires the button; changed() after each change, of the system's own theme too. */
export function theme(changed) {
  const button = byId("theme");
  const root = document.documentElement;
  const show = () => {
    const label = `Theme: ${root.dataset.theme ?? "system"}`;
    button.setAttribute("aria-label", label);
    button.title = label;
    changed();
  };
  button.addEventListener("click", () => {
    const next = ORDER[(ORDER.indexOf(root.dataset.theme ?? "system") + 1) % ORDER.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    remember(next);
    show();
    announce(button.title);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

function remember(choice) {
  try {
    if (choice === "system") localStorage.removeItem("flashmoe.theme");
    else localStorage.setItem("flashmoe.theme", choice);
  } catch {
    // Storage is forbidden: the choice lives as long as this page.
  }
}
