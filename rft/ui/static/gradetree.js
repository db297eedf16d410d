// A grade as a tree: score, parts, shadow grades, what went wrong.

import { h, visible } from "./dom.js";
import { grade, seconds } from "./format.js";

export function gradeTree(given, { open = true } = {}) {
  return h("div", { class: "grade" }, node(given, open, true));
}

function node(given, isOpen, isRoot) {
  const facts = [given.is_cached ? "cached" : null, given.latency_s > 0 ? seconds(given.latency_s) : null]
    .filter(Boolean)
    .join(", ");
  const line = [
    h("span", { class: "grade-name" }, visible(given.name || (isRoot ? "grade" : "part"))),
    h(
      "span",
      { class: "grade-bar", "aria-hidden": "true" },
      h("span", { class: "grade-fill", style: { width: `${Math.min(1, Math.max(0, given.score)) * 100}%` } }),
    ),
    h("strong", { class: "num" }, grade(given.score)),
    h("span", { class: "small quiet" }, facts),
  ];
  const below = [
    Object.entries(given.errors).map(([flag, detail]) => problem(flag, detail)),
    given.parts.length
      ? h(
          "ul",
          { class: "grade-parts" },
          given.parts.map((part) => h("li", null, node(part, isOpen, false))),
        )
      : null,
    shadows(given),
  ];
  const hasMore =
    given.parts.length ||
    Object.keys(given.errors).length ||
    Object.keys(given.shadow).length ||
    Object.keys(given.shadow_errors).length;
  if (!hasMore) return h("div", { class: "grade-line" }, line);
  return h(
    "details",
    { open: isOpen },
    h("summary", { class: "grade-line" }, line),
    h("div", { class: "grade-below" }, below),
  );
}

function problem(flag, detail) {
  return h("p", { class: "small bad-text" }, visible(flag), ": ", visible(detail));
}

function shadows(given) {
  const scores = Object.entries(given.shadow);
  const errors = Object.entries(given.shadow_errors);
  if (!scores.length && !errors.length) return null;
  return h(
    "div",
    { class: "shadow" },
    h("p", { class: "small quiet" }, "Shadow grades, which nothing optimises"),
    h(
      "ul",
      { class: "grade-parts" },
      scores.map(([name, score]) =>
        h(
          "li",
          { class: "grade-line" },
          h("span", { class: "grade-name" }, visible(name)),
          h(
            "span",
            { class: "grade-bar", "aria-hidden": "true" },
            h("span", { class: "grade-fill", style: { width: `${Math.min(1, Math.max(0, score)) * 100}%` } }),
          ),
          h("strong", { class: "num" }, grade(score)),
        ),
      ),
    ),
    errors.map(([name, detail]) => problem(name, detail)),
  );
}
