// The table of rollouts: filters, sorting and paging are the server's; the address keeps them.

import { get, runPath } from "../api.js";
import { h, plain, swap, visible } from "../dom.js";
import { count, grade, number, percent, seconds, words } from "../format.js";
import { failure } from "../messages.js";
import { go, to } from "../places.js";
import { filterForm } from "./filters.js";

const LIMIT = 100;
const EVERY_MS = 3000;
const COLUMNS = [
  // [field, heading, how it is shown, is it a number]
  ["step", "Step", (row) => number(row.step), true],
  ["item_id", "Item", (row) => visible(row.item_id), false],
  ["attempt", "Attempt", (row) => number(row.attempt), true],
  ["grade", "Grade", (row) => grade(row.grade), true],
  ["stop_reason", "Ended by", (row) => stop(row), false],
  ["split", "Split", (row) => row.split, false],
  ["num_turns", "Turns", (row) => number(row.num_turns), true],
  [null, "Tool calls", (row) => tools(row.tools), false],
  ["num_tokens", "Tokens", (row) => number(row.num_tokens), true],
  ["num_reasoning_tokens", "Reasoning", (row) => number(row.num_reasoning_tokens), true],
  ["duration_s", "Took", (row) => seconds(row.duration_s), true],
  [null, "Answer begins", (row) => opening(row), false],
];

export async function show(panel, place, { run, signal }) {
  // `wanted` runs ahead of `query` until the address has changed.
  const state = {
    query: { ...place.query },
    wanted: { ...place.query },
    page: null,
    before: [],
    chosen: new Set(),
    isBusy: false,
  };
  const table = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Rollouts" });
  const status = h("p", { class: "small quiet", role: "status" });
  const problems = h("div", null);
  const paging = h("div", { class: "bar paging" });
  const grader = h("button", {
    type: "button",
    disabled: true,
    onclick: () => go(to(["runs", run, "grader"], { rollouts: [...state.chosen].join(",") })),
  });

  const visit = (changes, options) => {
    const isPaging = "after" in changes;
    state.wanted = { ...state.wanted, ...(isPaging ? {} : { after: "", page: "" }), ...changes };
    if (!isPaging) state.before = [];
    go(to(["runs", run, "rollouts"], state.wanted), options);
  };
  const form = filterForm(state.query, (changes) => visit(changes));

  async function load({ isQuiet = false } = {}) {
    if (state.isBusy && isQuiet) return;
    const asked = state.query;
    state.isBusy = true;
    table.setAttribute("aria-busy", "true");
    try {
      const { page: _, ...query } = asked;
      const page = await get(runPath(run, "rollouts"), { query: { limit: LIMIT, ...query }, signal });
      if (asked !== state.query) return;
      const isSame = isQuiet && JSON.stringify(page) === JSON.stringify(state.page);
      state.page = page;
      if (!isSame) draw(); // what a user has selected in the text stays selected
      swap(problems);
    } catch (error) {
      if (signal.aborted || asked !== state.query) return;
      if (isQuiet) throw error; // the one that follows the run says so
      swap(problems, failure(error));
    } finally {
      if (asked === state.query) {
        state.isBusy = false;
        table.removeAttribute("aria-busy");
      }
    }
  }
  async function loadChoices() {
    const choices = await get(runPath(run, "choices"), { signal });
    form.offer(choices);
  }

  function draw() {
    const { page } = state;
    const at = Number(state.query.page || 1);
    const share = page.indexed_share < 1 ? ` Still looking through old rollouts: ${percent(page.indexed_share)}.` : "";
    status.textContent = `${count(page.num_matching, "rollout")} found.${page.num_matching > LIMIT ? ` Page ${at}.` : ""}${share}`;
    swap(
      table,
      page.rollouts.length
        ? rows(page.rollouts, run, state, { visit, drawGrader })
        : h("p", { class: "empty" }, "No rollout matches."),
    );
    drawPaging(at);
    drawGrader();
  }
  function drawPaging(at) {
    const previous = () =>
      state.before.length ? visit({ after: state.before.pop(), page: at - 1 > 1 ? at - 1 : "" }) : visit({});
    const next = () => {
      state.before.push(state.query.after ?? "");
      visit({ after: state.page.next, page: at + 1 });
    };
    const isFirst = !state.query.after;
    swap(
      paging,
      h(
        "button",
        { type: "button", disabled: isFirst, "data-key": "previous", onclick: previous },
        state.before.length || isFirst ? "Previous page" : "First page",
      ),
      h("button", { type: "button", disabled: !state.page.next, "data-key": "next", onclick: next }, "Next page"),
      h("span", { class: "grow" }),
      grader,
    );
  }
  function drawGrader() {
    const num = state.chosen.size;
    grader.disabled = num === 0;
    grader.textContent = num ? `Try a grader on ${count(num, "rollout")}` : "Choose rollouts to try a grader on";
  }

  swap(panel, h("h2", { class: "sr" }, "Rollouts"), form.element, status, problems, table, paging);
  await Promise.all([load(), loadChoices()]);
  const isFirstPage = () => !state.query.after;
  return {
    // Rows that a user reads do not move under him: only the first page follows the run.
    renew: () => (isFirstPage() ? Promise.all([load({ isQuiet: true }), loadChoices()]) : loadChoices()),
    look: () => (state.page && state.page.indexed_share < 1 ? load({ isQuiet: true }) : null),
    everyMs: EVERY_MS,
    update(next) {
      state.query = { ...next.query };
      state.wanted = state.query;
      form.set(state.query);
      return load();
    },
  };
}

function rows(rollouts, run, state, options) {
  const sort = state.query.sort || "-step";
  return h(
    "table",
    { class: "rollouts" },
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        h("th", { scope: "col" }, h("span", { class: "sr" }, "Choose")),
        COLUMNS.map((column) => heading(column, sort, options)),
      ),
    ),
    h(
      "tbody",
      null,
      rollouts.map((row) => line(row, run, state, options)),
    ),
  );
}

function heading([field, label, , isNumber], sort, { visit }) {
  if (!field) return h("th", { scope: "col" }, label);
  const isBy = sort.replace(/^-/, "") === field;
  const isDescending = isBy && sort.startsWith("-");
  const next = isBy && !isDescending ? `-${field}` : isBy ? field : isNumber ? `-${field}` : field;
  const order = isBy ? (isDescending ? "descending" : "ascending") : null;
  const arrow = h("span", { "aria-hidden": "true", class: "arrow" }, isBy ? (isDescending ? "↓" : "↑") : "");
  return h(
    "th",
    { scope: "col", "aria-sort": order, class: isNumber ? "num" : "" },
    h(
      "button",
      { type: "button", class: "heading", "data-key": `sort-${field}`, onclick: () => visit({ sort: next }) },
      label,
      arrow,
    ),
  );
}

function line(row, run, state, { drawGrader }) {
  const choose = (event) => {
    if (event.target.checked) state.chosen.add(row.id);
    else state.chosen.delete(row.id);
    drawGrader();
  };
  const name = `${plain(row.item_id)}, attempt ${row.attempt}, step ${row.step}`;
  const box = h("input", {
    type: "checkbox",
    name: "chosen",
    checked: state.chosen.has(row.id),
    "aria-label": `Choose ${name}`,
    "data-key": `choose-${row.id}`,
    onchange: choose,
  });
  const link = (content) =>
    h(
      "a",
      { href: to(["runs", run, "trace", row.id]), "data-key": `trace-${row.id}`, "aria-label": `Trace of ${name}` },
      content,
    );
  return h(
    "tr",
    null,
    h("td", null, box),
    COLUMNS.map(([field, , shown, isNumber]) => {
      const content = shown(row);
      return h(
        "td",
        { class: isNumber ? "num" : field ? "nowrap clip" : "" },
        field === "item_id" ? link(content) : content,
      );
    }),
  );
}

function stop(row) {
  return [
    h("span", { class: "stop", "data-stop": plain(row.stop_reason) }, words(row.stop_reason)),
    row.error ? h("div", { class: "small warn-text clip-text", title: plain(row.error) }, visible(row.error)) : null,
  ];
}

function tools(calls) {
  const names = Object.entries(calls);
  if (!names.length) return h("span", { class: "quiet" }, "none");
  return names.map(([name, num], index) => [
    index ? ", " : "",
    h("span", { class: "nowrap" }, visible(name), num > 1 ? ` ×${num}` : ""),
  ]);
}

function opening(row) {
  return h("span", { class: "clip-text", title: plain(row.opening) }, visible(row.opening));
}
