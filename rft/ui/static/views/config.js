// The run's config, as it was resolved, without secrets: sections that fold, and the whole as JSON.

import { h, swap, visible } from "../dom.js";

export function show(panel, place, { view }) {
  const { config } = view();
  const sections = Object.entries(config).filter(([, value]) => isSection(value));
  const plainOnes = Object.entries(config).filter(([, value]) => !isSection(value));
  swap(
    panel,
    h("h2", { class: "sr" }, "Config"),
    h(
      "div",
      { class: "config-grid" },
      plainOnes.length ? h("section", { class: "card" }, h("h3", null, "run"), entries(plainOnes)) : null,
      sections.map(([name, value]) =>
        h("section", { class: "card" }, h("h3", null, visible(name)), entries(Object.entries(value))),
      ),
    ),
    h(
      "details",
      { class: "card" },
      h("summary", null, "The whole config as JSON"),
      h("pre", { class: "text", tabindex: 0 }, visible(JSON.stringify(config, null, 2))),
    ),
  );
}

const isSection = (value) => value !== null && typeof value === "object" && Object.keys(value).length > 0;

function entries(pairs) {
  return h(
    "dl",
    { class: "entries" },
    pairs.map(([name, value]) => [h("dt", null, visible(name)), h("dd", null, shown(value))]),
  );
}

function shown(value) {
  if (value === null) return h("span", { class: "quiet" }, "not set");
  if (typeof value === "string")
    return value.includes("\n") ? h("pre", { class: "text" }, visible(value)) : visible(value === "" ? "empty" : value);
  if (typeof value !== "object") return String(value);
  if (!Object.keys(value).length) return h("span", { class: "quiet" }, "none");
  if (Array.isArray(value))
    return h(
      "ol",
      { class: "config-list" },
      value.map((one) => h("li", null, shown(one))),
    );
  return entries(Object.entries(value));
}
