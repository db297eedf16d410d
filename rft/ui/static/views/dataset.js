// Is a dataset right? A JSONL file, chosen or pasted, and every problem with its line, its field and its cure.

import { get, post, runPath } from "../api.js";
import { h, newId, plain, swap, visible } from "../dom.js";
import { editor } from "../editor.js";
import { count } from "../format.js";
import { failure, say, setTitle } from "../messages.js";

const MAX_SHOWN = 200_000; // characters of a file put into the text area; more is sent without being shown

export async function show(main, place, { signal }) {
  setTitle("Check a dataset");
  const area = editor({
    label: "Rows as JSONL",
    rows: 12,
    isJson: false,
    placeholder: '{"messages": [{"role": "user", "content": "…"}], "answer": "…"}',
    help: "One JSON object per line. It is checked on this server and kept nowhere.",
    onInput: () => forgetFile(),
  });
  const file = h("input", {
    type: "file",
    id: newId("file"),
    accept: ".jsonl,.json,.ndjson,.txt",
    onchange: () => readFile(),
  });
  const run = h("select", { id: newId("run") }, h("option", { value: "" }, "none: the tools are not looked at"));
  const button = h("button", { type: "submit", class: "primary" }, "Check");
  const status = h("p", { class: "small quiet", role: "status" });
  const results = h("section", { "aria-label": "Result", class: "stack" });
  let whole = null; // the text of a file too long to show

  function forgetFile() {
    whole = null;
    file.value = "";
    status.textContent = "";
  }
  async function readFile() {
    const [chosen] = file.files;
    if (!chosen) return;
    const text = await chosen.text();
    whole = text.length > MAX_SHOWN ? text : null;
    area.set(text.slice(0, MAX_SHOWN));
    status.textContent = `${plain(chosen.name)}: ${count(text.length, "character")}${whole ? ", of which the beginning is shown" : ""}.`;
  }
  async function check(event) {
    event.preventDefault();
    const text = whole ?? area.value();
    area.complain(text.trim() ? "" : "There is nothing to check: choose a file or paste rows.");
    if (!text.trim()) return area.area.focus();
    button.disabled = true;
    try {
      const environment = run.value ? ((await get(runPath(run.value), { signal })).config.environment ?? null) : null;
      const found = await post("datasets/validate", { text, environment }, { signal });
      swap(results, result(found));
      say(found.num_problems ? count(found.num_problems, "problem") : "No problem found.");
    } catch (error) {
      if (!signal.aborted) swap(results, failure(error));
    }
    button.disabled = false;
    return null;
  }
  swap(
    main,
    h("h1", null, "Check a dataset"),
    h(
      "form",
      { class: "card stack", onsubmit: check },
      h("label", { class: "field", for: file.id }, h("span", null, "A JSONL file"), file),
      area.element,
      h(
        "label",
        { class: "field", for: run.id },
        h("span", null, "Are its tools served by the environment of a run?"),
        run,
      ),
      h("div", { class: "bar" }, button, status),
    ),
    results,
  );
  const { runs } = await get("runs", { signal }).catch(() => ({ runs: [] }));
  run.append(
    ...runs.map((one) =>
      h("option", { value: one.id }, plain(one.name === one.id ? one.name : `${one.name} (${one.id})`)),
    ),
  );
}

function result(found) {
  const isGood = found.num_problems === 0;
  const headline = isGood
    ? `No problem found in ${count(found.num_rows, "row")}.`
    : `${count(found.num_problems, "problem")} in ${count(found.num_rows, "row")}${found.num_problems > found.problems.length ? `; the first ${found.problems.length}` : ""}.`;
  return [
    h("h2", null, "Result"),
    h("p", { class: `note ${isGood ? "good" : "bad"}` }, headline),
    found.problems.length ? problems(found.problems) : null,
    h(
      "div",
      { class: "config-grid" },
      h(
        "section",
        { class: "card" },
        h("h3", null, "Columns"),
        h(
          "dl",
          { class: "entries" },
          Object.entries(found.columns).map(([name, num]) => [
            h("dt", null, visible(name)),
            h("dd", null, count(num, "row")),
          ]),
        ),
      ),
      h(
        "section",
        { class: "card" },
        h("h3", null, "Tools"),
        found.tools.length
          ? h(
              "ul",
              { class: "config-list" },
              found.tools.map((name) => h("li", null, visible(name))),
            )
          : h("p", { class: "quiet" }, "No row names a tool."),
      ),
      found.example
        ? h(
            "section",
            { class: "card" },
            h("h3", null, "Messages of the first good row"),
            h("pre", { class: "text", tabindex: 0 }, visible(indented(found.example))),
          )
        : null,
    ),
  ];
}

function problems(found) {
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Problems" },
    h(
      "table",
      { class: "cards" },
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          ["Line", "Field", "Problem", "Cure"].map((name) =>
            h("th", { scope: "col", class: name === "Line" ? "num" : "" }, name),
          ),
        ),
      ),
      h(
        "tbody",
        null,
        found.map((one) =>
          h(
            "tr",
            null,
            h("td", { class: "num", "data-label": "Line" }, one.line ?? "–"),
            h("td", { "data-label": "Field" }, h("code", null, visible(one.field ?? "–"))),
            h("td", { "data-label": "Problem" }, visible(one.problem)),
            h("td", { "data-label": "Cure" }, visible(one.cure)),
          ),
        ),
      ),
    ),
  );
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
