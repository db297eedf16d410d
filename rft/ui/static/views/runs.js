// All runs: how each stands, and the way to compare some of them.

import { actionButtons } from "../actions.js";
import { follow, get } from "../api.js";
import { h, plain, swap, visible } from "../dom.js";
import { ago, count, time } from "../format.js";
import { failure, say, setLost, setTitle } from "../messages.js";
import { go, to } from "../places.js";
import { badge, isLive, progress, sparkline } from "../status.js";

const EVERY_MS = 2000;

export async function show(main, place, { signal, about }) {
  setTitle("Runs");
  const state = { runs: [], filter: place.query.filter ?? "", chosen: new Set(), last: "" };
  const list = h("div", { class: "runs" });
  const problems = h("div", null);
  const summary = h("p", { class: "quiet small", "aria-live": "polite" });
  const compare = h(
    "button",
    {
      type: "button",
      class: "primary",
      disabled: true,
      onclick: () => go(to(["compare"], { runs: [...state.chosen].join(",") })),
    },
    "Compare",
  );
  const filter = h("input", {
    type: "search",
    id: "filter-runs",
    value: state.filter,
    placeholder: "name, state, model, kind",
    autocomplete: "off",
  });
  filter.addEventListener("input", () => {
    state.filter = filter.value;
    history.replaceState(null, "", to([], { filter: state.filter }));
    draw();
  });

  const choose = (run, isChosen) => {
    if (isChosen) state.chosen.add(run.id);
    else state.chosen.delete(run.id);
    drawCompare();
  };
  function drawCompare() {
    const num = state.chosen.size;
    compare.disabled = num < 2;
    compare.textContent = num < 2 ? "Choose two runs to compare" : `Compare ${num} runs`;
  }
  function draw() {
    const found = state.runs.filter((run) => matches(run, state.filter));
    const live = state.runs.filter((run) => isLive(run.status)).length;
    summary.textContent = `${count(state.runs.length, "run")}, ${live} live${state.filter ? `, ${found.length} shown` : ""}`;
    const options = {
      signal,
      choose,
      chosen: state.chosen,
      onError: (error) => swap(problems, failure(error)),
      onDone: () => renew(),
    };
    swap(list, found.length ? table(found, options) : nothing(state, about));
  }
  async function renew() {
    const found = await get("runs", { signal });
    const written = JSON.stringify(found.runs);
    if (written !== state.last) {
      if (state.last) told(state.runs, found.runs);
      Object.assign(state, { runs: found.runs, last: written });
      const ids = new Set(found.runs.map((run) => run.id));
      for (const id of state.chosen) if (!ids.has(id)) state.chosen.delete(id);
      draw();
    }
  }

  await renew();
  drawCompare();
  draw();
  const tools = h(
    "div",
    { class: "bar" },
    h("label", { class: "field inline grow", for: "filter-runs" }, h("span", null, "Filter"), filter),
    compare,
  );
  swap(main, h("div", { class: "headline" }, h("h1", null, "Runs"), summary), tools, problems, list);
  follow(renew, { signal, onLost: setLost, waitMs: EVERY_MS });
}

/** For screen readers: a run that ended or began. */
function told(before, after) {
  const known = new Map(before.map((run) => [run.id, run.status]));
  for (const run of after) {
    if (known.get(run.id) !== run.status) say(`${plain(run.name)}: ${run.status}`);
  }
}

function matches(run, filter) {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const text = [run.id, run.name, run.kind, run.status, run.job?.id, run.job?.model].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

function nothing(state, about) {
  if (state.runs.length) return h("p", { class: "empty" }, "No run matches the filter.");
  const what =
    about.mode === "server"
      ? "Create a job, and it appears here."
      : "Start one with “rft train CONFIG”, and it appears here.";
  return h("p", { class: "empty" }, `There is no run yet. ${what}`);
}

function table(runs, options) {
  const headings = ["Choose", "Run", "State", "Progress", "Grade", "Changed", "Actions"];
  return h(
    "table",
    { class: "cards" },
    h("caption", { class: "sr" }, "Runs, newest first"),
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        headings.map((name) => h("th", { scope: "col" }, name === "Choose" ? h("span", { class: "sr" }, name) : name)),
      ),
    ),
    h(
      "tbody",
      null,
      runs.map((run) => row(run, options)),
    ),
  );
}

function row(run, { choose, chosen, ...options }) {
  const box = h("input", {
    ...{ type: "checkbox", name: "chosen", checked: chosen.has(run.id), "data-key": `choose-${run.id}` },
    "aria-label": `Compare ${plain(run.name)}`,
    onchange: (event) => choose(run, event.target.checked),
  });
  const link = h("a", { href: to(["runs", run.id]), class: "strong", "data-key": `run-${run.id}` }, visible(run.name));
  const about = [
    run.kind === "training" ? null : run.kind,
    run.name === run.id ? null : run.id,
    run.job?.id !== run.id ? run.job?.id : null,
    run.job?.model,
  ];
  const problem = run.job?.error ?? run.problem;
  return h(
    "tr",
    null,
    h("td", { class: "choose" }, box),
    h(
      "th",
      { scope: "row" },
      link,
      h(
        "div",
        { class: "small quiet" },
        about.filter(Boolean).map((text, index) => [index ? " · " : "", visible(text)]),
      ),
      problem ? h("div", { class: "small warn-text clamp" }, visible(problem)) : null,
    ),
    h("td", { "data-label": "State" }, badge(run.status)),
    h("td", { "data-label": "Progress" }, progress(run)),
    h("td", { "data-label": "Grade" }, sparkline(run.grades, run.split)),
    h(
      "td",
      { "data-label": "Changed", class: "small nowrap", title: time(run.updated_at ?? run.started_at) },
      ago(run.updated_at ?? run.started_at),
    ),
    h("td", { class: "row-actions" }, actionButtons(run, options)),
  );
}
