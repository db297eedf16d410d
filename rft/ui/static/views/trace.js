// One rollout: what was asked, what the model and the tools said, when, and what the grader made of it.

import { get, runPath } from "../api.js";
import { h, plain, swap, visible } from "../dom.js";
import { count, grade, seconds, time, words } from "../format.js";
import { gradeTree } from "../gradetree.js";
import { folded, longText } from "../longtext.js";
import { note, setTitle } from "../messages.js";
import { to } from "../places.js";
import { groupPanel } from "./group.js";
import { timeLine } from "./timeline.js";
import { tokenPanel } from "./tokens.js";

const SHORT_PROMPT = 1200; // characters; a longer prompt is folded

export async function show(main, place, { signal }) {
  const [, run, , rollout] = place.parts;
  const trace = await get(runPath(run, "rollouts", rollout), { signal });
  const line = trace.rollout;
  setTitle("Trace", plain(line.item_id));
  const options = { run, rollout, signal };
  swap(
    main,
    crumbs(run, line),
    headline(trace, run),
    trace.error ? note(trace.error, "bad") : null,
    facts(trace),
    h(
      "div",
      { class: "trace" },
      h(
        "div",
        { class: "trace-main" },
        timeLine(trace),
        source(trace, options),
        turns(trace, options),
        tokenPanel(options),
      ),
      h("aside", { class: "trace-side", "aria-label": "Grade and group" }, graded(trace), groupPanel(trace, options)),
    ),
  );
}

function crumbs(run, line) {
  const slash = () => h("span", { "aria-hidden": "true" }, "/");
  return h(
    "nav",
    { "aria-label": "Where you are", class: "crumbs" },
    h("a", { href: "#/" }, "Runs"),
    slash(),
    h("a", { href: to(["runs", run]) }, visible(run)),
    slash(),
    h(
      "a",
      { href: to(["runs", run, "rollouts"], { step_from: line.step, step_to: line.step }) },
      `Rollouts of step ${line.step}`,
    ),
    slash(),
    h("span", null, "Trace"),
  );
}

function headline(trace, run) {
  const { group, rollout } = trace;
  const at = group.findIndex((one) => one.id === rollout.id);
  const step = (other, label) =>
    other
      ? h("a", { class: "button small-button", href: to(["runs", run, "trace", other.id]) }, label)
      : h("span", { class: "button small-button off", "aria-disabled": "true" }, label);
  return h(
    "div",
    { class: "headline" },
    h("h1", null, visible(rollout.item_id), h("span", { class: "quiet" }, ` attempt ${rollout.attempt}`)),
    h(
      "span",
      { class: "score", "data-graded": rollout.grade !== null },
      rollout.grade === null ? "no grade" : [h("span", { class: "score-label" }, "grade "), grade(rollout.grade)],
    ),
    h("span", { class: "stop", "data-stop": plain(rollout.stop_reason) }, words(plain(rollout.stop_reason))),
    h("span", { class: "grow" }),
    at >= 0
      ? h(
          "nav",
          { class: "actions", "aria-label": "Rollouts of the group" },
          step(group[at - 1], "Previous of group"),
          step(group[at + 1], "Next of group"),
        )
      : null,
  );
}

function facts(trace) {
  const { rollout } = trace;
  const tokens = `${count(rollout.num_tokens, "token")} sampled, ${rollout.num_reasoning_tokens} of reasoning`;
  const pairs = [
    ["Step", `${rollout.step}, ${rollout.split}`],
    ["Took", seconds(rollout.duration_s)],
    ["Tokens", tokens],
    ["Started", time(rollout.started_at)],
    ["Seed", String(trace.seed)],
    ["Trace id", rollout.id],
  ];
  return h(
    "dl",
    { class: "facts-line" },
    pairs.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, visible(value)))),
  );
}

function source(trace, options) {
  const isOpen = trace.prompt.num_chars <= SHORT_PROMPT;
  return h(
    "section",
    { class: "card" },
    h("h2", null, "Prompt"),
    folded("As the model read it", trace.prompt, { ...options, label: "the prompt" }, { open: isOpen }),
    trace.item
      ? folded("The dataset row", trace.item, { ...options, label: "the row" })
      : h("p", { class: "small quiet" }, "The dataset row is gone: its file cannot be read."),
    folded("How the environment says it went", trace.environment, { ...options, label: "the environment" }),
  );
}

function graded(trace) {
  const heading = h("h2", null, "Grade");
  if (!trace.grade)
    return h(
      "section",
      { class: "card" },
      heading,
      h("p", { class: "quiet" }, "It was discarded, and no grader has seen it."),
    );
  return h("section", { class: "card" }, heading, gradeTree(trace.grade));
}

// --- turns ---

function turns(trace, options) {
  if (!trace.turns.length)
    return h("section", null, h("h2", null, "Turns"), h("p", { class: "empty" }, "Nothing was sampled."));
  return h(
    "section",
    { "aria-label": "Turns" },
    h("h2", { class: "section-heading" }, "Turns"),
    trace.turns.map((turn) => turnCard(turn, options)),
  );
}

function turnCard(turn, options) {
  const numbers = `sampled in ${seconds(turn.sampled_s)} · ${count(turn.num_output_tokens, "token")} out, ${turn.num_input_tokens} in · policy version ${turn.policy_version}`;
  const place = `of turn ${turn.index + 1}`;
  return h(
    "article",
    { class: "card turn", id: `turn-${turn.index}`, tabindex: -1, "aria-label": `Turn ${turn.index + 1}` },
    h(
      "header",
      null,
      h("h3", null, `Turn ${turn.index + 1}`),
      h("span", { class: "small quiet" }, numbers),
      turn.finish_reason === "length" ? h("span", { class: "tag warn" }, "cut at its token limit") : null,
      turn.is_fork ? h("span", { class: "tag" }, "history rendered anew") : null,
    ),
    turn.reasoning.num_chars
      ? h(
          "div",
          { class: "said reasoning" },
          h(
            "h4",
            null,
            "Reasoning",
            h("span", { class: "small quiet" }, ` ${count(turn.num_reasoning_tokens, "token")}`),
          ),
          longText(turn.reasoning, { ...options, label: `the reasoning ${place}` }),
        )
      : null,
    turn.content.num_chars || !turn.calls.length
      ? h(
          "div",
          { class: "said" },
          h("h4", null, "Said"),
          longText(turn.content, { ...options, label: `the answer ${place}` }),
        )
      : null,
    turn.calls.map((call, index) => callCard(call, turn, index, options)),
    turn.replies.map((reply) =>
      h(
        "div",
        { class: "said reply" },
        h("h4", null, "Reply of the environment, as ", visible(reply.role)),
        longText(reply.content, { ...options, label: "the reply" }),
      ),
    ),
  );
}

function callCard(call, turn, index, options) {
  const isBad = call.is_error || call.malformed !== null;
  const attempts = call.num_attempts > 1 ? ` · ${call.num_attempts} attempts` : "";
  return h(
    "div",
    {
      class: "call",
      id: `call-${turn.index}-${index}`,
      tabindex: -1,
      "data-bad": isBad,
      role: "group",
      "aria-label": `Call of ${plain(call.name)}`,
    },
    h(
      "h4",
      null,
      "Tool call ",
      h("code", null, visible(call.name)),
      h("span", { class: "small quiet" }, ` ${seconds(call.latency_s)}${attempts}`),
      call.is_error ? h("span", { class: "tag bad" }, "error") : null,
    ),
    call.malformed !== null
      ? h("p", { class: "small bad-text" }, "Malformed, never executed: ", visible(call.malformed))
      : null,
    h(
      "div",
      { class: "payloads" },
      h("div", null, h("h5", null, "Arguments"), longText(call.arguments, { ...options, label: "the arguments" })),
      h(
        "div",
        null,
        h("h5", null, "Result"),
        call.result
          ? longText(call.result, { ...options, label: "the result" })
          : h("p", { class: "quiet small" }, "None: the rollout ended before it came."),
      ),
    ),
  );
}
