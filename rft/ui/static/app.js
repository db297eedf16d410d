// The page's frame: which view an address shows, the theme, the key. A view is a module with
// `show(main, place, context)`; it may return `{update(place)}` to stay while only the query of its address changes.

import { get, key } from "./api.js";
import { askedKey } from "./dialogs.js";
import { h, swap } from "./dom.js";
import { failure, setLost, say } from "./messages.js";
import { here, to } from "./places.js";

const THEME = "rft-theme";
const VIEWS = [
  [/^$/, () => import("./views/runs.js")],
  [/^compare$/, () => import("./views/compare.js")],
  [/^dataset$/, () => import("./views/dataset.js")],
  [/^jobs\/new$/, () => import("./views/job.js")],
  [/^runs\/[^/]+\/trace\/[^/]+$/, () => import("./views/trace.js")],
  [/^runs\/[^/]+\/grader$/, () => import("./views/grader.js")],
  [/^runs\/[^/]+(\/(charts|rollouts|doctor|events|config))?$/, () => import("./views/run.js")],
];

const main = document.getElementById("main");
let about = { mode: "folder", needs_key: false, version: "" };
let shown = { path: null, leave: null, view: null };
let isAsking = false;

async function showPlace({ isAgain = false } = {}) {
  const place = here();
  const path = place.parts.map(encodeURIComponent).join("/");
  markNav(path);
  if (!isAgain && shown.path === path && shown.view?.update) return shown.view.update(place);
  shown.leave?.abort();
  const leave = new AbortController();
  const isFirst = shown.path === null;
  const mine = (shown = { path, leave, view: null });
  setLost(false);
  const load = VIEWS.find(([pattern]) => pattern.test(path))?.[1];
  if (!load) return swap(main, h("h1", null, "Nothing here"), h("p", null, h("a", { href: "#/" }, "All runs")));
  try {
    const { show } = await load();
    if (leave.signal.aborted) return null;
    const view = await show(main, place, { signal: leave.signal, about });
    if (shown === mine) shown.view = view ?? null;
  } catch (error) {
    if (leave.signal.aborted) return null;
    swap(main, h("h1", null, "This cannot be shown"), failure(error), h("p", null, h("a", { href: "#/" }, "All runs")));
  }
  if (!isFirst && !isAgain && !leave.signal.aborted && !main.contains(document.activeElement)) {
    window.scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
  return null;
}

// --- the frame ---

function markNav(path) {
  const links = [
    ["", "Runs"],
    ["dataset", "Check a dataset"],
  ];
  if (about.mode === "server") links.push(["jobs/new", "New job"]);
  const isAt = (target) => (target ? path === target : path === "" || path.startsWith("runs") || path === "compare");
  const nav = document.getElementById("nav");
  swap(
    nav,
    links.map(([target, label]) =>
      h(
        "a",
        {
          href: to(target.split("/").filter(Boolean)),
          "data-key": `nav-${target}`,
          "aria-current": isAt(target) ? "page" : null,
        },
        label,
      ),
    ),
  );
}

function themePicker() {
  const options = [
    ["", "System"],
    ["light", "Light"],
    ["dark", "Dark"],
  ];
  const chosen = stored(THEME) ?? "";
  const choose = (event) => {
    const { value } = event.target;
    if (value) document.documentElement.dataset.theme = value;
    else delete document.documentElement.dataset.theme;
    store(THEME, value);
    window.dispatchEvent(new CustomEvent("rft:theme"));
  };
  return h(
    "label",
    { class: "theme" },
    h("span", { class: "sr" }, "Theme"),
    h(
      "select",
      { name: "theme", onchange: choose },
      options.map(([value, label]) => h("option", { value, selected: value === chosen }, label)),
    ),
  );
}

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // storage is forbidden here: the choice lasts as long as the page
  }
}

function store(name, value) {
  try {
    if (value) localStorage.setItem(name, value);
    else localStorage.removeItem(name);
  } catch {
    // as above
  }
}

function drawTop() {
  const forget = h(
    "button",
    { type: "button", class: "plain", "data-key": "forget", onclick: forgetKey },
    "Forget key",
  );
  const give = h(
    "button",
    { type: "button", class: "plain", "data-key": "give", onclick: () => needKey("") },
    "Give key",
  );
  swap(document.getElementById("top-end"), about.needs_key ? (key.get() ? forget : give) : null, themePicker());
}

function forgetKey() {
  key.forget();
  say("The key is forgotten.");
  drawTop();
  showPlace({ isAgain: true });
}

async function needKey(reason) {
  if (isAsking || !about.needs_key) return;
  isAsking = true;
  const given = await askedKey(reason);
  isAsking = false;
  if (given === null) return;
  key.set(given);
  drawTop();
  showPlace({ isAgain: true });
}

async function start() {
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  window.addEventListener("rft:key", (event) => needKey(key.get() ? event.detail : ""));
  drawTop();
  try {
    about = await get("about");
  } catch (error) {
    swap(
      main,
      h("h1", null, "No answer"),
      failure(error),
      h("button", { type: "button", onclick: () => location.reload() }, "Try again"),
    );
    return;
  }
  drawTop();
  window.addEventListener("hashchange", () => showPlace());
  await showPlace();
  // the chart library is large: it comes while a person looks at the list
  window.requestIdleCallback?.(() =>
    import("./plotly.js").then(({ library }) => library()).catch(() => null),
  );
}

start();
