// One run: its headline and its tabs. The headline is read again whenever the run's revision changes.

import { actionButtons } from "../actions.js";
import { follow, get, pause, runPath } from "../api.js";
import { h, plain, swap, visible } from "../dom.js";
import { ago, time } from "../format.js";
import { failure, note, setLost, setTitle } from "../messages.js";
import { to } from "../places.js";
import { badge, isLive, progress } from "../status.js";
import { tabBar } from "../tabs.js";

const TABS = {
  charts: ["Charts", () => import("./charts.js")],
  rollouts: ["Rollouts", () => import("./rollouts.js")],
  doctor: ["Doctor", () => import("./doctor.js")],
  events: ["Events", () => import("./events.js")],
  config: ["Config", () => import("./config.js")],
};
const SLOW_MS = 5000;
const SHARE = 4; // times as long as it took

export async function show(main, place, context) {
  const { signal } = context;
  const [, run, tab = "charts"] = place.parts;
  // its code and its first numbers come while the run is asked for; `showTab` says when they do not
  TABS[tab][1]()
    .then(({ ahead }) => ahead?.(run, signal))
    .catch(() => null);
  let view = await get(runPath(run), { signal });
  setTitle(TABS[tab][0], plain(view.run.name));
  const head = h("div", { class: "run-head" });
  const problems = h("div", { id: "run-problems" });
  const panel = h("section", { id: "tab-panel", class: "panel" });
  const tabs = tabBar(
    "Parts of the run",
    Object.entries(TABS).map(([name, [label]]) => [name, label, to(["runs", run, name])]),
    tab,
    panel,
  );
  const onError = (error) => swap(problems, failure(error));
  const drawHead = () => {
    const onDone = (line) => ((view = { ...view, run: line }), drawHead());
    swap(head, headline(view, { signal, onDone, onError }));
    swap(
      problems,
      view.problems.map((text) => note(text, "warn")),
    );
  };
  drawHead();
  swap(main, head, problems, tabs, panel);

  const fill = () => showTab(panel, place, { ...context, run, view: () => view });
  let inside = await fill();

  let last = null;
  const renew = seldom(async () => {
    if (inside) await inside.renew?.();
    else inside = await fill(); // it failed before
    return inside?.everyMs ?? 0;
  });
  const look = async () => {
    const { revision, status } = await get(runPath(run, "revision"), { signal });
    const isNew = last !== null && revision !== last;
    if (isNew) {
      view = await get(runPath(run), { signal });
      drawHead();
    }
    last = revision;
    await renew(isNew);
    await inside?.look?.();
    if (!isLive(status)) await pause(SLOW_MS, signal); // it may be resumed
  };
  follow(look, { signal, onLost: setLost });
  return { update: (next) => (inside?.update ? inside.update(next) : null) };
}

/** A tab that fails says so in its panel; the headline stays. */
async function showTab(panel, place, context) {
  try {
    const { show: showInside } = await TABS[place.parts[2] ?? "charts"][1]();
    return await showInside(panel, place, context);
  } catch (error) {
    const isMissing = error.status === 404; // a job that waits has nothing to show yet
    if (!context.signal.aborted)
      swap(panel, isMissing ? h("p", { class: "empty" }, visible(error.message)) : failure(error));
    return null;
  }
}

/** Calls `renew` after something is new: not more often than every so many ms as it returns, nor most of the time. */
function seldom(renew) {
  let isOld = false;
  let next = 0;
  return async (isNew) => {
    isOld ||= isNew;
    if (!isOld || performance.now() < next) return;
    isOld = false;
    const began = performance.now();
    const everyMs = await renew();
    next = performance.now() + Math.max(everyMs, SHARE * (performance.now() - began));
  };
}

function headline(view, options) {
  const { run } = view;
  const facts = [
    run.kind,
    run.name === run.id ? null : run.id,
    run.job?.id !== run.id ? run.job?.id : null,
    run.job?.model,
    run.job?.fine_tuned_model,
  ];
  return [
    h(
      "nav",
      { "aria-label": "Where you are", class: "crumbs" },
      h("a", { href: "#/", "data-key": "crumb" }, "Runs"),
      h("span", { "aria-hidden": "true" }, "/"),
      visible(run.name),
    ),
    h(
      "div",
      { class: "headline" },
      h("h1", null, visible(run.name)),
      badge(run.status),
      progress(run),
      h("span", { class: "grow" }),
      h(
        "a",
        { class: "button small-button", href: to(["runs", run.id, "grader"]), "data-key": "grader" },
        "Try a grader",
      ),
      actionButtons(run, options),
    ),
    h(
      "p",
      { class: "small quiet facts" },
      facts.filter(Boolean).map((text, index) => [index ? " · " : "", visible(text)]),
      ` · started ${time(run.started_at)}`,
      run.updated_at ? ` · changed ${ago(run.updated_at)}` : "",
    ),
    run.problem ? note(run.problem, "warn") : null,
    run.job?.error ? note(run.job.error, "bad") : null,
    view.doing.length ? doing(view.doing) : null,
  ];
}

function doing(lines) {
  const rest = lines.slice(1);
  const first = h("strong", null, visible(lines[0].trim()));
  if (!rest.length) return h("div", { class: "doing", role: "group", "aria-label": "What it does now" }, first);
  return h(
    "details",
    { class: "doing", role: "group", "data-key": "doing", "aria-label": "What it does now" },
    h("summary", null, first),
    h(
      "ul",
      { class: "lines" },
      rest.map((line) => h("li", null, visible(line.replace(/^ {2}/, "")))),
    ),
  );
}
