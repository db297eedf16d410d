// The tokens of a rollout, as they are trained: coloured by log-probability or by what counts in the loss.

import { get, runPath } from "../api.js";
import { h, newId, plain, swap } from "../dom.js";
import { count, number } from "../format.js";
import { failure, note } from "../messages.js";

const LIMIT = 2000;
const BOUNDS = [-0.05, -0.3, -0.9, -2, -4]; // natural logs: from sure to surprised
const SPECIAL = /^(<\|.*\|>|<\/?[A-Za-z_]+>|\[[A-Z_]+\])$/;

export function tokenPanel({ run, rollout, signal }) {
  const state = { tokens: [], starts: [], advantage: null, num: null, by: "logprob" };
  const box = h("div", null);
  const details = h("details", { class: "card tokens-card" }, h("summary", null, h("h2", null, "Tokens")), box);
  let isAsked = false;
  details.addEventListener("toggle", () => {
    if (details.open && !isAsked) {
      isAsked = true;
      more();
    }
  });

  async function more() {
    try {
      const query = { offset: state.tokens.length, limit: LIMIT };
      const found = await get(runPath(run, "rollouts", rollout, "tokens"), { query, signal });
      state.tokens.push(...found.tokens);
      Object.assign(state, {
        starts: found.sequence_starts,
        advantage: found.advantage,
        num: found.num_tokens,
        problem: found.problem,
      });
      draw();
    } catch (error) {
      if (!signal.aborted) swap(box, failure(error));
    }
  }
  function draw() {
    const reading = h(
      "p",
      { class: "token-reading num", id: newId("reading"), role: "status" },
      "Point at a token, or reach one with Tab and the arrow keys.",
    );
    const left = state.num - state.tokens.length;
    swap(
      box,
      state.problem ? note(state.problem, "warn") : null,
      choiceOf(state, draw),
      legend(state.by),
      h("p", { class: "small quiet" }, summary(state)),
      reading,
      tokenField(state, reading),
      left > 0
        ? h(
            "button",
            { type: "button", "data-key": "more-tokens", onclick: more },
            `Show more tokens (${left.toLocaleString("en")} left)`,
          )
        : null,
    );
  }
  return details;
}

function summary({ num, starts, advantage, tokens }) {
  const trained = tokens.filter((token) => token.is_trained).length;
  const weight = advantage === null ? "" : ` Advantage ${number(advantage)}.`;
  return `${count(num, "token")} in ${count(Math.max(1, starts.length), "sequence")}; of the ${tokens.length.toLocaleString("en")} shown ${trained.toLocaleString("en")} count in the loss.${weight}`;
}

function choiceOf(state, draw) {
  const name = newId("colour-by");
  const one = (value, label) =>
    h(
      "label",
      null,
      h("input", {
        type: "radio",
        name,
        value,
        checked: state.by === value,
        "data-key": `by-${value}`,
        onchange: () => ((state.by = value), draw()),
      }),
      label,
    );
  return h(
    "fieldset",
    { class: "choice" },
    h("legend", null, "Colour by"),
    one("logprob", "Log-probability"),
    one("mask", "Loss mask"),
  );
}

function legend(by) {
  const key = (look, label) =>
    h("span", { class: "token-key" }, h("span", { class: "token", "data-look": look }, " "), label);
  if (by === "mask")
    return h("p", { class: "small token-legend" }, key("trained", "counts in the loss"), key("given", "does not"));
  const bounds = [
    ...BOUNDS.map((bound, index) => key(`p${index}`, index ? `to −${-bound}` : `above −${-bound}`)),
    key("p5", "below"),
    key("given", "not sampled"),
  ];
  return h("p", { class: "small token-legend" }, bounds);
}

function lookOf(token, by) {
  if (by === "mask") return token.is_trained ? "trained" : "given";
  if (token.logprob === null) return "given";
  const at = BOUNDS.findIndex((bound) => token.logprob >= bound);
  return `p${at < 0 ? BOUNDS.length : at}`;
}

/** One stop for the Tab key; arrow keys move inside, as in a toolbar. */
function tokenField(state, reading) {
  const starts = new Set(state.starts);
  const spans = [];
  const field = h("div", { class: "tokens", role: "group", "aria-label": "Tokens", "aria-describedby": reading.id });
  state.tokens.forEach((token, index) => {
    if (starts.has(index) && index > 0)
      field.append(h("div", { class: "sequence-break small quiet" }, "next sequence"));
    const span = h(
      "span",
      {
        class: SPECIAL.test(token.text) ? "token special" : "token",
        "data-look": lookOf(token, state.by),
        "data-index": index,
        tabindex: index ? -1 : 0,
        role: "img",
        "aria-label": describe(token, index),
      },
      marked(token.text, token.id),
    );
    spans.push(span);
    field.append(span);
    if (token.text.includes("\n")) field.append(h("br", null));
  });
  const read = (event) => {
    const index = event.target.closest?.("[data-index]")?.dataset.index;
    if (index !== undefined) reading.textContent = describe(state.tokens[index], Number(index));
  };
  field.addEventListener("pointerover", read);
  field.addEventListener("focusin", read);
  field.addEventListener("keydown", (event) => {
    const at = Number(document.activeElement?.dataset?.index ?? -1);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20 }[event.key];
    const next =
      event.key === "Home"
        ? 0
        : event.key === "End"
          ? spans.length - 1
          : step === undefined || at < 0
            ? null
            : Math.min(spans.length - 1, Math.max(0, at + step));
    if (next === null) return;
    event.preventDefault();
    spans[at]?.setAttribute("tabindex", "-1");
    spans[next].setAttribute("tabindex", "0");
    spans[next].focus();
  });
  return field;
}

/** Whitespace as marks, controls as codes. */
function marked(text, id) {
  if (text === "") return `#${id}`;
  return plain(text).replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "→");
}

function describe(token, index) {
  const value =
    token.logprob === null
      ? "not sampled"
      : `log-probability ${number(token.logprob)}, probability ${(Math.exp(token.logprob) * 100).toFixed(1)}%`;
  return `Token ${index}: “${marked(token.text, token.id)}”, id ${token.id}, ${value}, ${token.is_trained ? "counts in the loss" : "not in the loss"}`;
}
