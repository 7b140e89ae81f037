// The panels at both sides, which become drawers over the conversation where there is no room for them.

import { byId } from "./dom.js";

/** The list of conversations.  close() does nothing where it always stands beside the conversation. */
export function sidebarDrawer() {
  const app = byId("app");
  const set = (open) => {
    app.classList.toggle("sidebar-open", open);
    byId("open-sidebar").setAttribute("aria-expanded", String(open));
    byId("shade").hidden = !open;
    if (open) byId("close-sidebar").focus();
  };
  const close = () => {
    if (!app.classList.contains("sidebar-open")) return;
    set(false);
    byId("open-sidebar").focus();
  };
  byId("open-sidebar").addEventListener("click", () => set(true));
  byId("close-sidebar").addEventListener("click", close);
  byId("shade").addEventListener("click", close);
  byId("sidebar").addEventListener("keydown", (event) => event.key === "Escape" && close());
  return { close };
}
