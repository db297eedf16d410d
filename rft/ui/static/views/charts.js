// A run's charts, side by side; brought up to date when the run's revision changes.

import { get, runPath } from "../api.js";
import { chartCard, linesOf, watcher } from "../chartcard.js";
import { h, swap } from "../dom.js";
import { library } from "../plotly.js";

const POINTS = 600; // a chart is about as many pixels wide

let asked = null; // {run, answer}: numbers on their way to a view that is not shown yet

const numbers = (run, signal) => get(runPath(run, "charts"), { query: { points: POINTS }, signal });

/** Ask for what `show` will need first. */
export function ahead(run, signal) {
  asked = { run, answer: numbers(run, signal) };
  asked.answer.catch(() => null); // said by who shows them
  library().catch(() => null); // as its card says
}

export async function show(panel, place, { run, signal }) {
  const watch = watcher(signal);
  const cards = new Map(); // by the chart's id
  const grid = h("div", { class: "charts" });
  const empty = h("p", { class: "empty" }, "There are no numbers yet: they come with the first step.");
  swap(panel, h("h2", { class: "sr" }, "Charts"), empty, grid);

  async function renew() {
    const answer = asked?.run === run ? asked.answer : numbers(run, signal);
    asked = null;
    const { charts } = await answer;
    const ids = new Set(charts.map((chart) => chart.id));
    for (const [id, card] of cards) {
      if (!ids.has(id)) {
        watch.remove(card);
        card.element.remove();
        cards.delete(id);
      }
    }
    for (const chart of charts) {
      const isNew = !cards.has(chart.id);
      const card = isNew ? chartCard() : cards.get(chart.id);
      card.set(chart, linesOf(chart));
      if (isNew) {
        cards.set(chart.id, card);
        grid.append(card.element);
        watch.add(card);
      }
    }
    empty.hidden = charts.length > 0;
  }
  await renew();
  return { renew };
}
