// How a run stands, in little: its status, its progress, its grade over the steps.

import { h, plain } from "./dom.js";
import { grade, words } from "./format.js";

const LIVE = new Set(["validating_files", "queued", "starting", "running", "paused"]);

/** True while more may come. */
export const isLive = (status) => LIVE.has(status);

export function badge(status) {
  return h("span", { class: "badge", "data-status": plain(status) }, words(plain(status)));
}

export function progress(run) {
  if (run.step === null || !run.steps) return h("span", { class: "quiet" }, "–");
  const done = Math.min(1, run.step / run.steps);
  const label = `step ${run.step} of ${run.steps}`;
  const attributes = { class: "progress", role: "progressbar", "aria-label": "progress", "aria-valuenow": run.step };
  return h(
    "div",
    { class: "progress-box" },
    h(
      "div",
      { ...attributes, "aria-valuemin": 0, "aria-valuemax": run.steps, "aria-valuetext": label },
      h("div", { class: "progress-done", style: { width: `${done * 100}%` } }),
    ),
    h("span", { class: "small" }, label),
  );
}

const WIDTH = 120;
const HEIGHT = 28;
const MARGIN = 3;

/** The grades as a line without axes; its text says where it began and where it is. */
export function sparkline(grades, split) {
  const known = grades.map((value, index) => [index, value]).filter(([, value]) => value !== null);
  if (!known.length) return h("span", { class: "quiet" }, "no grade yet");
  const values = known.map(([, value]) => value);
  const low = Math.min(...values);
  const high = Math.max(...values);
  const across = (index) => MARGIN + (index / Math.max(1, grades.length - 1)) * (WIDTH - 2 * MARGIN);
  const up = (value) =>
    high === low ? HEIGHT / 2 : HEIGHT - MARGIN - ((value - low) / (high - low)) * (HEIGHT - 2 * MARGIN);
  const path = known
    .map(([index, value], at) => `${at ? "L" : "M"}${across(index).toFixed(1)} ${up(value).toFixed(1)}`)
    .join(" ");
  const [lastIndex, last] = known[known.length - 1];
  const label = `${split ?? ""} grade from ${grade(values[0])} to ${grade(last)}`.trim();
  return h(
    "span",
    { class: "spark" },
    h(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, role: "img", "aria-label": label },
      h("path", { d: path, class: "spark-line" }),
      h("circle", { cx: across(lastIndex).toFixed(1), cy: up(last).toFixed(1), r: 2.6, class: "spark-dot" }),
    ),
    h("span", { class: "spark-value" }, grade(last)),
    split ? h("span", { class: "small quiet" }, split) : null,
  );
}
