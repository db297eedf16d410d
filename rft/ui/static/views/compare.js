// Several runs in one chart: colour says which run, dash which line of the chart.

import { follow, get, runPath } from "../api.js";
import { chartCard, watcher } from "../chartcard.js";
import { h, plain, swap, visible } from "../dom.js";
import { number } from "../format.js";
import { failure, setLost, setTitle } from "../messages.js";
import { go, to } from "../places.js";
import { badge } from "../status.js";

const POINTS = 600;
const EVERY_MS = 3000;

export async function show(main, place, { signal }) {
  setTitle("Compare runs");
  const ids = (place.query.runs ?? "").split(",").filter(Boolean);
  const state = { chart: place.query.chart ?? "", runs: [], revisions: new Map(), problems: [] };
  const card = chartCard({ height: 380, heading: "h2" });
  const watch = watcher(signal);
  const select = h("select", {
    id: "chart-choice",
    onchange: () => go(to(["compare"], { runs: ids.join(","), chart: select.value }), { replace: true }),
  });
  const about = h("div", null);
  const summary = h("div", { class: "scroll" });

  async function load(id) {
    const { revision } = await get(runPath(id, "revision"), { signal });
    if (state.revisions.get(id) === revision) return state.runs.find((run) => run.id === id);
    const [view, charts] = await Promise.all([
      get(runPath(id), { signal }),
      get(runPath(id, "charts"), { query: { points: POINTS }, signal }),
    ]);
    state.revisions.set(id, revision);
    return { id, line: view.run, charts: charts.charts };
  }
  async function renew() {
    const before = [...state.revisions.values()].join();
    const found = await Promise.allSettled(ids.map(load));
    if (signal.aborted) return;
    state.runs = found.filter((one) => one.status === "fulfilled").map((one) => one.value);
    state.problems = found.flatMap((one, index) =>
      one.status === "rejected" ? [`${plain(ids[index])}: ${one.reason.message}`] : [],
    );
    if ([...state.revisions.values()].join() !== before || state.problems.length) draw();
  }
  function draw() {
    const titles = new Map(state.runs.flatMap((run) => run.charts.map((chart) => [chart.id, chart])));
    const chosen = titles.get(state.chart) ?? titles.get("grade") ?? [...titles.values()][0];
    swap(
      select,
      [...titles.values()].map((chart) =>
        h("option", { value: chart.id, selected: chart.id === chosen?.id }, plain(chart.title)),
      ),
    );
    swap(
      about,
      state.problems.map((text) => failure(new Error(text))),
    );
    card.element.hidden = !chosen;
    if (!chosen) return swap(summary, h("p", { class: "empty" }, "None of these runs has numbers yet."));
    const lines = linesOfRuns(state.runs, chosen.id);
    // The runs have their own colours, so nothing is stacked here.
    card.set({ ...chosen, kind: "lines" }, lines);
    return swap(summary, table(state.runs, chosen));
  }

  if (!ids.length)
    return swap(
      main,
      h("h1", null, "Compare runs"),
      h("p", { class: "empty" }, "Choose two or more ", h("a", { href: "#/" }, "runs"), "."),
    );
  await renew();
  draw();
  swap(
    main,
    h("div", { class: "headline" }, h("h1", null, "Compare runs")),
    h(
      "div",
      { class: "bar" },
      h("label", { class: "field inline", for: "chart-choice" }, h("span", null, "Chart"), select),
    ),
    about,
    card.element,
    summary,
  );
  watch.add(card);
  follow(renew, { signal, onLost: setLost, waitMs: EVERY_MS });
  return {
    update(next) {
      if ((next.query.runs ?? "") !== (place.query.runs ?? "")) return location.reload();
      state.chart = next.query.chart ?? "";
      return draw();
    },
  };
}

function linesOfRuns(runs, chartId) {
  const found = runs.flatMap((run, at) =>
    (run.charts.find((chart) => chart.id === chartId)?.series ?? []).map((series) => ({ run, at, series })),
  );
  const kinds = [...new Set(found.map(({ series }) => `${series.name}, ${series.split ?? ""}`))];
  return found.map(({ run, at, series }) => {
    const kind = `${series.name}, ${series.split ?? ""}`;
    const label = kinds.length > 1 ? `${run.line.name}: ${kind.replace(/, $/, "")}` : run.line.name;
    return {
      series,
      label: sameName(runs, run) ? `${label} (${run.id})` : label,
      colourIndex: at,
      dashIndex: kinds.indexOf(kind),
    };
  });
}

const sameName = (runs, run) => runs.some((other) => other !== run && other.line.name === run.line.name);

/** The last value of each line of each run. */
function table(runs, chosen) {
  const kinds = [
    ...new Set(
      runs.flatMap((run) =>
        (run.charts.find((chart) => chart.id === chosen.id)?.series ?? []).map(
          (series) => `${series.name}|${series.split ?? ""}`,
        ),
      ),
    ),
  ];
  const last = (run, kind) => {
    const series = run.charts
      .find((chart) => chart.id === chosen.id)
      ?.series.find((one) => `${one.name}|${one.split ?? ""}` === kind);
    const at = series ? series.y.findLastIndex((value) => value !== null) : -1;
    return at < 0 ? "–" : `${number(series.y[at])} at step ${series.x[at]}`;
  };
  return h(
    "table",
    null,
    h("caption", null, `Last values: ${plain(chosen.title)}`),
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        h("th", { scope: "col" }, "Run"),
        h("th", { scope: "col" }, "State"),
        kinds.map((kind) =>
          h("th", { scope: "col", class: "num" }, visible(kind.replace("|", ", ").replace(/, $/, ""))),
        ),
      ),
    ),
    h(
      "tbody",
      null,
      runs.map((run) =>
        h(
          "tr",
          null,
          h(
            "th",
            { scope: "row" },
            h("a", { href: to(["runs", run.id]) }, visible(run.line.name)),
            sameName(runs, run) ? h("div", { class: "small quiet" }, visible(run.id)) : null,
          ),
          h("td", null, badge(run.line.status)),
          kinds.map((kind) => h("td", { class: "num nowrap" }, last(run, kind))),
        ),
      ),
    ),
  );
}
