// When a rollout sampled and when it waited for its tools: a row per part, on one axis of seconds.

import { h, plain, visible } from "../dom.js";
import { seconds } from "../format.js";

const MAX_ROWS = 200;

export function timeLine(trace) {
  const all = spans(trace);
  if (!all.length) return null;
  const rows = all.slice(0, MAX_ROWS);
  const end = Math.max(trace.rollout.duration_s, ...all.map((span) => span.start + span.took), 1e-9);
  const sampled = all.filter((span) => span.kind === "sampling").reduce((sum, span) => sum + span.took, 0);
  return h(
    "section",
    { class: "card", "aria-labelledby": "time-line" },
    h("h2", { id: "time-line" }, "Time line"),
    h(
      "p",
      { class: "small quiet" },
      `${seconds(end)} in all, ${seconds(sampled)} of them sampling. A row leads to its part below.`,
      all.length > rows.length ? ` The first ${rows.length} of ${all.length} rows.` : "",
    ),
    h(
      "ol",
      { class: "gantt" },
      rows.map((span) => h("li", null, bar(span, end))),
    ),
    h(
      "div",
      { class: "gantt-axis small quiet", "aria-hidden": "true" },
      [0, 0.25, 0.5, 0.75, 1].map((share) => h("span", null, seconds(share * end).replace("0 µs", "0"))),
    ),
  );
}

function spans(trace) {
  const found = trace.turns.flatMap((turn) => [
    {
      kind: "sampling",
      name: `turn ${turn.index + 1}, sampling`,
      start: turn.started_s,
      took: turn.sampled_s,
      target: `turn-${turn.index}`,
    },
    ...turn.calls
      .filter((call) => call.malformed === null)
      .map((call) => ({
        ...{ kind: call.is_error ? "failed" : "call", name: call.name, start: call.started_s, took: call.latency_s },
        target: `call-${turn.index}-${turn.calls.indexOf(call)}`,
      })),
  ]);
  const graded = trace.grade;
  if (graded && graded.latency_s > 0)
    found.push({
      kind: "grading",
      name: "grading",
      start: Math.max(0, trace.rollout.duration_s - graded.latency_s),
      took: graded.latency_s,
      target: null,
    });
  return found;
}

function bar(span, end) {
  const isFailed = span.kind === "failed";
  const label = `${plain(span.name)}${isFailed ? ", failed" : ""}: ${seconds(span.took)}, begins at ${seconds(span.start)}`;
  const look = { left: `${(span.start / end) * 100}%`, width: `${Math.max(0.4, (span.took / end) * 100)}%` };
  const inside = [
    h("span", { class: "gantt-name" }, visible(span.name), isFailed ? " (failed)" : ""),
    h("span", { class: "gantt-track" }, h("span", { class: "gantt-bar", "data-kind": span.kind, style: look })),
    h("span", { class: "gantt-time num" }, seconds(span.took)),
  ];
  if (!span.target) return h("div", { class: "gantt-row" }, inside);
  const lead = () => {
    const target = document.getElementById(span.target);
    target?.scrollIntoView({ block: "center" });
    target?.focus({ preventScroll: true });
  };
  return h("button", { type: "button", class: "gantt-row", "aria-label": label, title: label, onclick: lead }, inside);
}
