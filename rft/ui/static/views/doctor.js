// What the doctor found: the worst first, each with what shows it and what to do.

import { get, runPath } from "../api.js";
import { h, swap, visible } from "../dom.js";
import { count, number, percent, words } from "../format.js";
import { note } from "../messages.js";
import { to } from "../places.js";

const EVERY_MS = 20_000; // it reads the whole run

export async function show(panel, place, { run, signal }) {
  swap(panel, h("p", { class: "quiet", role: "status" }, "Looking at the run"));
  const renew = async () => {
    const found = await get(runPath(run, "doctor"), { signal });
    swap(panel, diagnosis(found, run));
  };
  await renew();
  return { renew, everyMs: EVERY_MS };
}

function diagnosis(found, run) {
  const about = `${count(found.checks.length, "check")} over ${count(found.num_steps, "step")}: ${count(found.findings.length, "finding")}.`;
  return [
    h("h2", { class: "sr" }, "Findings"),
    h("p", { class: "quiet" }, about),
    found.problems.map((text) => note(text, "warn")),
    found.findings.length
      ? h(
          "ol",
          { class: "findings" },
          found.findings.map((finding, index) => h("li", null, findingCard(finding, index + 1, run))),
        )
      : h("p", { class: "empty" }, "Nothing found that would spoil this run."),
    h(
      "details",
      { class: "small" },
      h("summary", null, "Checks that were made"),
      h("p", null, found.checks.map(words).join(", ")),
    ),
  ];
}

function findingCard(finding, rank, run) {
  const steps = finding.steps ? ` · steps ${finding.steps[0]} to ${finding.steps[1]}` : "";
  const share = finding.weight > 0 ? ` · ${percent(finding.weight)} of the run` : "";
  return h(
    "article",
    { class: "card finding", "data-severity": finding.severity },
    h(
      "header",
      null,
      h("h3", null, `${rank}. `, visible(finding.title)),
      h(
        "span",
        { class: "small quiet" },
        h("span", { class: "severity" }, finding.severity),
        visible(` · ${words(finding.check)}${steps}${share}`),
      ),
    ),
    h("p", null, visible(finding.evidence)),
    numbers(finding.numbers),
    h("p", { class: "cure" }, h("strong", null, "Cure: "), visible(finding.cure)),
    finding.rollout_ids.length
      ? h(
          "p",
          { class: "small" },
          "Rollouts: ",
          finding.rollout_ids.map((id, index) => [
            index ? ", " : "",
            h("a", { href: to(["runs", run, "trace", id]) }, visible(short(id))),
          ]),
        )
      : null,
  );
}

const short = (id) => (id.length > 20 ? `${id.slice(0, 14)}…` : id);

function numbers(values) {
  const pairs = Object.entries(values);
  if (!pairs.length) return null;
  return h(
    "dl",
    { class: "numbers" },
    pairs.map(([name, value]) => h("div", null, h("dt", null, visible(words(name))), h("dd", null, number(value)))),
  );
}
