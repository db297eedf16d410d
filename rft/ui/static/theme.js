// Light or dark, before anything is drawn: what the user chose, else what the system says.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("rft-theme");
  } catch {
    // storage is forbidden here: the system decides
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
