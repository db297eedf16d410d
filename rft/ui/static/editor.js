// A text area for JSON or code: line numbers, and what is wrong with the JSON at once.

import { h, newId } from "./dom.js";

/** `{element, area, value(), set(text), parsed(), complain(message)}`; `parsed` is null where it is no JSON. */
export function editor({
  label,
  value = "",
  rows = 14,
  isJson = true,
  help = null,
  placeholder = null,
  onInput = () => {},
}) {
  const id = newId("editor");
  const problem = h("p", { class: "problem", id: `${id}-problem`, "aria-live": "polite" });
  const lines = h("pre", { class: "line-numbers", "aria-hidden": "true" });
  const described = `${id}-problem${help ? ` ${id}-help` : ""}`;
  const area = h("textarea", {
    ...{ id, rows, wrap: "off", spellcheck: "false", autocomplete: "off", class: "editor-area", placeholder },
    "aria-describedby": described,
    oninput: () => (check(), onInput()),
    onscroll: () => {
      lines.scrollTop = area.scrollTop;
    },
  });
  function check() {
    const num = area.value.split("\n").length;
    lines.textContent = Array.from({ length: Math.min(num, 20_000) }, (_, index) => index + 1).join("\n");
    complain(isJson && area.value.trim() ? problemOf(area.value) : "");
  }
  function complain(message) {
    problem.textContent = message ?? "";
    if (message) area.setAttribute("aria-invalid", "true");
    else area.removeAttribute("aria-invalid");
  }
  const set = (text) => ((area.value = text), check());
  set(value);
  const element = h(
    "div",
    { class: "field" },
    h("label", { for: id }, label),
    help ? h("p", { class: "small quiet", id: `${id}-help` }, help) : null,
    h("div", { class: "editor" }, lines, area),
    problem,
  );
  return { element, area, set, complain, value: () => area.value, parsed: () => parsed(area.value) };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function problemOf(text) {
  try {
    JSON.parse(text);
    return "";
  } catch (error) {
    const message = String(error.message).replace(/^JSON\.parse: /, "");
    const at = /position (\d+)/.exec(message);
    if (!at || /line \d+/.test(message)) return `Not JSON: ${message}`;
    const before = text.slice(0, Number(at[1])).split("\n");
    return `Not JSON: ${message} (line ${before.length}, column ${before[before.length - 1].length + 1})`;
  }
}
