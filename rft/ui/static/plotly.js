// Plotly, loaded with the first chart, and how a chart of the page becomes its figure: SVG lines, intervals as bands.

import { plain } from "./dom.js";
import { number } from "./format.js";

const HEIGHT = 250;
const NUM_COLOURS = 8;
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const FONT = 'system-ui, "DejaVu Sans", sans-serif';
let loading = null;

/** The library, once. Raises Error when it does not come. */
export function library() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", import.meta.url).href;
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => ((loading = null), reject(new Error("the chart library did not load"))));
    document.head.append(script);
  });
  return loading;
}

/** A colour of the page's style, as it is now: rgb(...). */
function style(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

export const colour = (index) => style(`--series-${(index % NUM_COLOURS) + 1}`);
export const dash = (index) => DASHES[index % DASHES.length];

/** Names come from models and datasets, and Plotly reads a little markup: none may be in them. */
function inert(text) {
  return plain(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("%", "&#37;");
}

/** `lines`: [{series, label, colour, dash, hidden}] of one chart. */
export function traces(chart, lines) {
  const shown = lines.filter((line) => !line.hidden);
  return [
    ...shown.flatMap((line) => (chart.kind === "stacked" ? [] : band(line))),
    ...shown.map((line) => trace(chart, line)),
  ];
}

function trace(chart, { series, label, colour: rgb, dash: pattern }) {
  const hasMarkers = series.x.length < 40 && chart.kind !== "stacked";
  const base = {
    ...{ type: "scatter", x: series.x, y: series.y, name: inert(label), connectgaps: false, showlegend: false },
    mode: hasMarkers ? "lines+markers" : "lines",
    line: { color: rgb, width: chart.kind === "stacked" ? 0.8 : 2, dash: pattern },
    marker: { color: rgb, size: 5 },
    text: series.y.map((value, index) => reading(series, value, index)),
    hovertemplate: `${inert(label)}: %{text}<extra></extra>`,
  };
  if (chart.kind === "stacked") return { ...base, stackgroup: "one", fillcolor: faded(rgb, 0.45) };
  return { ...base, error_y: bars(series, rgb) };
}

function reading(series, value, index) {
  if (value === null) return "";
  const [low, high] = [series.low?.[index], series.high?.[index]];
  return low == null || high == null ? number(value) : `${number(value)} (${number(low)} to ${number(high)})`;
}

/** The interval of points that have no neighbour, where a band would have no width. */
function bars(series, rgb) {
  if (!series.low || !series.high) return { visible: false };
  const isAlone = (index) =>
    series.low[index] != null && series.low[index - 1] == null && series.low[index + 1] == null;
  if (!series.low.some((_, index) => isAlone(index))) return { visible: false }; // each bar is an element of its own
  const reach = (to) =>
    series.y.map((value, index) => (value !== null && isAlone(index) ? Math.abs(to[index] - value) : 0));
  return {
    type: "data",
    symmetric: false,
    array: reach(series.high),
    arrayminus: reach(series.low),
    color: rgb,
    thickness: 1.2,
    width: 3,
  };
}

/** The area between low and high: one closed shape per stretch without gaps. */
function band({ series, colour: rgb }) {
  if (!series.low || !series.high) return [];
  const x = [];
  const y = [];
  let stretch = [];
  const close = () => {
    if (stretch.length > 1) {
      const back = [...stretch].reverse();
      x.push(...stretch.map((at) => series.x[at]), ...back.map((at) => series.x[at]), null);
      y.push(...stretch.map((at) => series.high[at]), ...back.map((at) => series.low[at]), null);
    }
    stretch = [];
  };
  series.x.forEach((_, index) =>
    series.low[index] == null || series.high[index] == null ? close() : stretch.push(index),
  );
  close();
  if (!x.length) return [];
  const look = { mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: faded(rgb, 0.16) };
  return [{ type: "scatter", x, y, ...look, hoverinfo: "skip", showlegend: false }];
}

function faded(rgb, opacity) {
  return rgb.replace(/^rgb\((.*)\)$/, (_, parts) => `rgba(${parts},${opacity})`);
}

function layout(height) {
  const grid = { gridcolor: style("--line-soft"), linecolor: style("--line"), zeroline: false, automargin: true };
  const isCoarse = matchMedia("(pointer: coarse)").matches; // there a drag scrolls the page
  return {
    ...{ height, margin: { l: 44, r: 12, t: 8, b: 34 }, uirevision: "keep", showlegend: false, hovermode: "x unified" },
    ...{ paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: isCoarse ? false : "zoom" },
    font: { family: FONT, size: 11, color: style("--quiet") },
    xaxis: {
      ...grid,
      title: { text: "step", standoff: 6, font: { size: 11 } },
      tickformat: ",d",
      unifiedhovertitle: { text: "step %{x}" },
      showgrid: false,
      nticks: 8,
    },
    yaxis: { ...grid, nticks: 6, rangemode: "tozero", fixedrange: true },
    hoverlabel: {
      bgcolor: style("--raised"),
      bordercolor: style("--line"),
      font: { color: style("--text"), family: FONT, size: 12 },
    },
  };
}

/** Draw into `element`, or bring what is drawn there up to date. */
export async function draw(element, chart, lines, { height = HEIGHT } = {}) {
  const Plotly = await library();
  if (!element.isConnected) return;
  const config = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset" };
  await Plotly.react(element, traces(chart, lines), layout(height), config);
}

export function clear(element) {
  window.Plotly?.purge(element);
}
