// What the page says of itself: a failure in place of a view, a note, a word for screen readers.

import { h, visible } from "./dom.js";

export function failure(error) {
  const text = error?.status === 404 ? `Not found: ${error.message}` : (error?.message ?? String(error));
  return h("div", { class: "note bad", role: "alert" }, visible(text));
}

export function note(text, look = "") {
  return h("div", { class: `note ${look}` }, visible(text));
}

/** Read out, without moving the focus. */
export function say(text) {
  const said = document.getElementById("said");
  if (said) said.textContent = text;
}

export function setTitle(...parts) {
  document.title = [...parts, "rft"].join(" · ");
}

export function setLost(isLost) {
  document.getElementById("lost").hidden = !isLost;
}
