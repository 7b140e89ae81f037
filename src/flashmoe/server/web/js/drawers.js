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

const ROOM_FOR_MACHINE = 1100; // pixels: below, the panel covers the conversation, so it begins closed

/** The machine panel: watches only while it can be seen. */
export function machineDrawer(panel) {
  const node = byId("machine");
  const button = byId("toggle-machine");
  const follow = () => panel.watch(!node.hidden && document.visibilityState === "visible");
  const set = (open) => {
    node.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    follow();
  };
  const close = () => {
    set(false);
    button.focus();
  };
  button.addEventListener("click", () => set(node.hidden));
  byId("close-machine").addEventListener("click", close);
  node.addEventListener("keydown", (event) => event.key === "Escape" && innerWidth < ROOM_FOR_MACHINE && close());
  document.addEventListener("visibilitychange", follow);
  set(innerWidth >= ROOM_FOR_MACHINE);
}
