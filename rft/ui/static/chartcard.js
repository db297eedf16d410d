// A chart as a card: title, how to read it, a legend of switches, the drawing, the same as a table.
// Drawn only while it can be seen; what changes meanwhile is drawn when it comes into view.

import { h, newId, plain, swap, visible } from "./dom.js";
import { number } from "./format.js";
import { failure } from "./messages.js";
import { clear, colour, dash, draw } from "./plotly.js";

const MAX_ROWS = 500;

/** Watches which cards can be seen, until `signal` ends. */
export function watcher(signal) {
  const cards = new Map();
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) cards.get(entry.target)?.seen(entry.isIntersecting);
    },
    { rootMargin: "200px" },
  );
  const again = () => cards.forEach((card) => card.restyle());
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  window.addEventListener("rft:theme", again, { signal });
  scheme.addEventListener("change", again, { signal });
  signal.addEventListener("abort", () => {
    observer.disconnect();
    cards.forEach((card) => card.close());
  });
  return {
    add: (card) => (cards.set(card.element, card), observer.observe(card.element)),
    remove: (card) => (cards.delete(card.element), observer.unobserve(card.element), card.close()),
  };
}

/** The lines of one run's chart: colour says which series, dash which split; of a single series, both say the split. */
export function linesOf(chart) {
  const names = [...new Set(chart.series.map((series) => series.name))];
  const splits = [...new Set(chart.series.map((series) => series.split))];
  return chart.series.map((series) => {
    const at = names.length > 1 ? names.indexOf(series.name) : splits.indexOf(series.split);
    const label = splits.length > 1 && series.split ? `${series.name}, ${series.split}` : series.name;
    return {
      series,
      label,
      colourIndex: at,
      dashIndex: Math.max(0, ["train", "validation", "test"].indexOf(series.split)),
    };
  });
}

/** `set(chart, lines)` shows new numbers. `heading`: the tag of its title. */
export function chartCard({ height, heading = "h3" } = {}) {
  const id = newId("chart");
  const title = h(heading, { id });
  const unit = h("span", { class: "small quiet" });
  const help = h("p", { class: "small quiet", id: `${id}-help` });
  const legend = h("div", { class: "legend", role: "group", "aria-label": "Lines" });
  const plot = h("div", { class: "plot", role: "img", "aria-labelledby": id, "aria-describedby": `${id}-help` });
  const tableBox = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": id });
  const details = h("details", { class: "as-table" }, h("summary", null, "Show as table"), tableBox);
  const element = h(
    "figure",
    { class: "card chart" },
    h("figcaption", null, h("div", { class: "chart-title" }, title, unit), help),
    legend,
    plot,
    details,
  );
  const hidden = new Set();
  let [chart, lines, isSeen, isStale] = [null, [], false, true];

  const styled = () =>
    lines.map((line) => ({
      ...line,
      colour: colour(line.colourIndex),
      dash: chart.kind === "stacked" ? "solid" : dash(line.dashIndex),
      hidden: hidden.has(line.label),
    }));
  function renew() {
    isStale = true;
    if (!isSeen || !chart) return;
    isStale = false;
    draw(plot, chart, styled(), { height }).catch((error) => swap(plot, failure(error)));
  }
  function drawLegend() {
    const switches = styled().map((line) => {
      const toggle = () => {
        if (!hidden.delete(line.label)) hidden.add(line.label);
        drawLegend();
        renew();
      };
      return h(
        "button",
        {
          type: "button",
          class: "legend-key",
          "aria-pressed": !line.hidden,
          "data-key": `${id}-${line.label}`,
          onclick: toggle,
        },
        swatch(line),
        visible(line.label),
      );
    });
    swap(legend, switches.length > 1 ? switches : []);
  }
  function drawTable() {
    if (details.open) swap(tableBox, table(chart, lines));
  }
  details.addEventListener("toggle", drawTable);
  return {
    element,
    set(newChart, newLines) {
      [chart, lines] = [newChart, newLines];
      title.textContent = plain(chart.title);
      unit.textContent = plain(chart.unit);
      help.textContent = plain(chart.help);
      drawLegend();
      drawTable();
      renew();
    },
    seen(isNow) {
      isSeen = isNow;
      if (isSeen && isStale) renew();
    },
    restyle: () => (drawLegend(), renew()),
    close: () => clear(plot),
  };
}

function swatch(line) {
  const pattern = { solid: "", dash: "6 3", dot: "2 3", dashdot: "6 2 2 2", longdash: "10 3" }[line.dash];
  const look = { stroke: line.colour, "stroke-width": 3, ...(pattern ? { "stroke-dasharray": pattern } : {}) };
  return h(
    "svg",
    { width: 20, height: 8, viewBox: "0 0 20 8", "aria-hidden": "true", focusable: "false" },
    h("line", { x1: 1, y1: 4, x2: 19, y2: 4, style: look }),
  );
}

function table(chart, lines) {
  const steps = [...new Set(lines.flatMap((line) => line.series.x))].sort((a, b) => a - b);
  const places = lines.map((line) => new Map(line.series.x.map((step, index) => [step, index])));
  const cell = ({ series }, index) => {
    if (index === undefined || series.y[index] === null) return "–";
    const [low, high] = [series.low?.[index], series.high?.[index]];
    return low == null || high == null
      ? number(series.y[index])
      : `${number(series.y[index])} (${number(low)} to ${number(high)})`;
  };
  const last = steps.slice(-MAX_ROWS);
  return h(
    "table",
    null,
    h(
      "caption",
      { class: "small" },
      plain(chart.title),
      steps.length > last.length ? `, the last ${last.length} of ${steps.length} points` : "",
    ),
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        h("th", { scope: "col" }, "step"),
        lines.map((line) => h("th", { scope: "col" }, visible(line.label))),
      ),
    ),
    h(
      "tbody",
      null,
      last.map((step) =>
        h(
          "tr",
          null,
          h("th", { scope: "row" }, step),
          lines.map((line, at) => h("td", { class: "num" }, cell(line, places[at].get(step)))),
        ),
      ),
    ),
  );
}
