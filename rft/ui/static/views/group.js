// The rollouts of the same item at the same step: how they ended, and up to three of them side by side.

import { get, runPath } from "../api.js";
import { h, plain, swap, visible } from "../dom.js";
import { count, grade, seconds, words } from "../format.js";
import { gradeTree } from "../gradetree.js";
import { longText } from "../longtext.js";
import { failure } from "../messages.js";
import { to } from "../places.js";

const MAX_COLUMNS = 3;

export function groupPanel(trace, { run, rollout, signal }) {
  const chosen = new Set();
  const open = h("button", { type: "button", disabled: true, onclick: () => sideBySide() });
  const status = h("p", { class: "small quiet", role: "status" });
  const boxes = [];
  const drawOpen = () => {
    open.disabled = chosen.size < 2;
    open.textContent = chosen.size < 2 ? "Choose two or three to compare" : `Show ${chosen.size} side by side`;
    for (const box of boxes) box.disabled = !box.checked && chosen.size >= MAX_COLUMNS;
    status.textContent = chosen.size >= MAX_COLUMNS ? "Three are the most that can be shown." : "";
  };
  const line = (one) => {
    const isThis = one.id === rollout;
    const choose = (event) => (event.target.checked ? chosen.add(one.id) : chosen.delete(one.id), drawOpen());
    const box = h("input", {
      type: "checkbox",
      name: "column",
      "aria-label": `Compare attempt ${one.attempt}`,
      onchange: choose,
    });
    boxes.push(box);
    const name = `attempt ${one.attempt}`;
    return h(
      "li",
      { class: "member", "data-this": isThis },
      box,
      h(
        "div",
        { class: "member-text" },
        h(
          "div",
          { class: "member-head" },
          isThis
            ? h("strong", { "aria-current": "true" }, name)
            : h("a", { href: to(["runs", run, "trace", one.id]) }, name),
          h("strong", { class: "num" }, grade(one.grade)),
          h("span", { class: "stop", "data-stop": plain(one.stop_reason) }, words(plain(one.stop_reason))),
        ),
        h("div", { class: "small quiet clamp" }, visible(one.opening || one.error || "")),
      ),
    );
  };
  async function sideBySide() {
    open.disabled = true;
    try {
      const traces = await Promise.all(
        [...chosen].map((id) => (id === rollout ? trace : get(runPath(run, "rollouts", id), { signal }))),
      );
      traces.sort((a, b) => a.rollout.attempt - b.rollout.attempt);
      showColumns(traces, { run, signal });
    } catch (error) {
      if (!signal.aborted) swap(status, failure(error));
    }
    drawOpen();
  }
  const members = trace.group.map(line);
  drawOpen();
  return h(
    "section",
    { class: "card" },
    h("h2", null, "Group"),
    h(
      "p",
      { class: "small quiet" },
      `${count(trace.group.length, "rollout")} of this item at step ${trace.rollout.step}`,
    ),
    h("ol", { class: "members" }, members),
    open,
    status,
  );
}

function showColumns(traces, { run, signal }) {
  const before = document.activeElement;
  const close = h("button", { type: "submit", class: "plain" }, "Close");
  const dialog = h(
    "dialog",
    { class: "wide", "aria-label": "Rollouts side by side" },
    h("form", { method: "dialog", class: "dialog-head" }, h("h2", null, "Side by side"), close),
    h(
      "div",
      { class: "columns", tabindex: 0, role: "region", "aria-label": "Columns" },
      traces.map((trace) => column(trace, { run, signal })),
    ),
  );
  document.body.append(dialog);
  const end = () => dialog.close();
  signal.addEventListener("abort", end);
  dialog.addEventListener("close", () => {
    signal.removeEventListener("abort", end);
    dialog.remove();
    if (before?.isConnected) before.focus();
  });
  dialog.showModal();
}

function column(trace, { run, signal }) {
  const { rollout } = trace;
  const options = { run, rollout: rollout.id, signal, cut: 800 };
  return h(
    "article",
    { class: "column", "aria-label": `Attempt ${rollout.attempt}` },
    h(
      "h3",
      null,
      h("a", { href: to(["runs", run, "trace", rollout.id]) }, `Attempt ${rollout.attempt}`),
      h("strong", { class: "num" }, ` ${grade(rollout.grade)}`),
    ),
    h(
      "p",
      { class: "small quiet" },
      `${words(plain(rollout.stop_reason))}, ${count(rollout.num_turns, "turn")}, ${count(rollout.num_tokens, "token")}, ${seconds(rollout.duration_s)}`,
    ),
    trace.grade ? gradeTree(trace.grade, { open: false }) : null,
    trace.turns.map((turn) =>
      h(
        "div",
        { class: "column-turn" },
        h("h4", null, `Turn ${turn.index + 1}`),
        turn.reasoning.num_chars
          ? h(
              "details",
              null,
              h("summary", null, "Reasoning"),
              longText(turn.reasoning, { ...options, label: "the reasoning" }),
            )
          : null,
        turn.content.num_chars ? longText(turn.content, { ...options, label: "the answer" }) : null,
        turn.calls.map((call) =>
          h(
            "div",
            { class: "call", "data-bad": call.is_error || call.malformed !== null },
            h("h5", null, h("code", null, visible(call.name))),
            longText(call.arguments, { ...options, label: "the arguments" }),
            call.result ? longText(call.result, { ...options, label: "the result" }) : null,
          ),
        ),
      ),
    ),
  );
}
