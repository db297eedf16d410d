// A run's charts, side by side; brought up to date when the run's revision changes.

import { get, runPath } from "../api.js";
import { chartCard, linesOf, watcher } from "../chartcard.js";
import { h, swap } from "../dom.js";
import { library } from "../plotly.js";

const POINTS = 600; // a chart is about as many pixels wide

export async function show(panel, place, { run, signal }) {
  library().catch(() => null); // comes while the numbers come; who draws says it when it does not
  const watch = watcher(signal);
  const cards = new Map(); // by the chart's id
  const grid = h("div", { class: "charts" });
  const empty = h("p", { class: "empty" }, "There are no numbers yet: they come with the first step.");
  swap(panel, h("h2", { class: "sr" }, "Charts"), empty, grid);

  async function renew() {
    const { charts } = await get(runPath(run, "charts"), { query: { points: POINTS }, signal });
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
