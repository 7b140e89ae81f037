// Loaded before anything is drawn, so that a chosen theme does not flash in the other one.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("flashmoe.theme");
  } catch {
    // Storage is forbidden here: the system's theme stays.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
