// The grader playground: change a grader and see what it says of rollouts that are there.

import { get, post, runPath } from "../api.js";
import { h, newId, plain, swap, visible } from "../dom.js";
import { editor } from "../editor.js";
import { count, grade, seconds, signed } from "../format.js";
import { gradeTree } from "../gradetree.js";
import { failure, note, say, setTitle } from "../messages.js";
import { to } from "../places.js";

const MAX_GRADED = 50;

export async function show(main, place, { signal }) {
  const [, run] = place.parts;
  const chosen = (place.query.rollouts ?? "").split(",").filter(Boolean).slice(0, MAX_GRADED);
  const view = await get(runPath(run), { signal });
  setTitle("Try a grader", plain(view.run.name));
  const { json, source } = parts(view.config.grader ?? {});
  const code = editor({
    label: "Python source",
    value: source ?? "",
    rows: 18,
    isJson: false,
    help: "The source of the grader, with real line breaks.",
  });
  const settings = editor({
    label: "Grader as JSON",
    value: json,
    rows: source === null ? 18 : 8,
    help: "As hosted RFT takes it. It begins as this run's grader; nothing here changes the run.",
    onInput: () => renewCode(),
  });
  const renewCode = () => {
    code.element.hidden = !isPython(settings.parsed());
  };
  renewCode();

  const num = h("input", { type: "number", id: newId("num"), min: 1, max: MAX_GRADED, value: 8, inputmode: "numeric" });
  const which = chosen.length
    ? h(
        "p",
        null,
        `On ${count(chosen.length, "chosen rollout")}. `,
        h("a", { href: to(["runs", run, "grader"]) }, "Use the newest instead"),
      )
    : h("label", { class: "field inline", for: num.id }, h("span", null, "On the newest rollouts, how many"), num);
  const button = h("button", { type: "submit", class: "primary" }, "Run the grader");
  const status = h("p", { class: "small quiet", role: "status" });
  const results = h("section", { "aria-label": "Grades", class: "stack" });

  async function attempt(event) {
    event.preventDefault();
    const grader = settings.parsed();
    settings.complain("");
    code.complain("");
    if (grader === null || typeof grader !== "object") return settings.complain("Not a JSON object: mend it first.");
    if (!code.element.hidden) grader.source = code.value();
    button.disabled = true;
    const began = performance.now();
    status.textContent = "Grading";
    try {
      const body = { grader, rollout_ids: chosen, ...(chosen.length ? {} : { num_rollouts: Number(num.value) || 8 }) };
      const found = await post(runPath(run, "grade"), body, { signal });
      status.textContent = `Done in ${seconds((performance.now() - began) / 1000)}.`;
      showResult(found);
    } catch (error) {
      if (signal.aborted) return null;
      status.textContent = "";
      complainAt(error.param, error.message);
      swap(results, failure(error));
    }
    button.disabled = false;
    return null;
  }
  function complainAt(field, message) {
    const target = /(^|\.)source$/.test(field ?? "") && !code.element.hidden ? code : settings;
    target.complain(field ? `${field}: ${plain(message)}` : plain(message));
    target.area.focus();
  }
  function showResult(found) {
    if (found.problem) {
      complainAt(found.field, found.problem);
      say("The grader is wrong, and nothing was graded.");
      return swap(results, note(`Nothing was graded. ${found.field ? `${found.field}: ` : ""}${found.problem}`, "bad"));
    }
    return swap(
      results,
      h("h2", null, "Grades"),
      summary(found),
      found.graded.length ? table(found.graded, run) : h("p", { class: "empty" }, "There was no rollout to grade."),
    );
  }

  const form = h(
    "form",
    { class: "card stack", onsubmit: attempt },
    settings.element,
    code.element,
    which,
    h("div", { class: "bar" }, button, status),
  );
  swap(
    main,
    h(
      "nav",
      { "aria-label": "Where you are", class: "crumbs" },
      h("a", { href: "#/" }, "Runs"),
      h("span", { "aria-hidden": "true" }, "/"),
      h("a", { href: to(["runs", run]) }, visible(view.run.name)),
      h("span", { "aria-hidden": "true" }, "/"),
      h("span", null, "Grader"),
    ),
    h("h1", null, "Try a grader"),
    form,
    results,
  );
}

const isPython = (grader) => grader?.type === "python";

/** The run's grader without what is not set; the source of a python grader apart, to be read in lines. */
function parts(grader) {
  const given = withoutNull(grader);
  const source = isPython(given) && typeof given.source === "string" ? given.source : null;
  if (source !== null) delete given.source;
  return { json: JSON.stringify(given, null, 2), source };
}

function withoutNull(value) {
  if (Array.isArray(value)) return value.map(withoutNull);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value)
      .filter(([, one]) => one !== null)
      .map(([name, one]) => [name, withoutNull(one)]),
  );
}

function summary({ graded, mean_old: before, mean_new: after }) {
  const failed = graded.filter((one) => one.problem !== null).length;
  const change = before === null || after === null ? "" : ` (${signed(after - before)})`;
  return h(
    "p",
    null,
    `Mean of the old grades ${grade(before)}, of the new ones `,
    h("strong", null, grade(after)),
    `${change}. ${failed ? `The grader failed on ${failed} of ${graded.length}.` : ""}`,
  );
}

function table(graded, run) {
  const row = ({ rollout, grade: given, problem }) => {
    const [before, after] = [rollout.grade, given?.score ?? null];
    const errors = given ? allErrors(given) : [];
    return h(
      "tr",
      null,
      h(
        "th",
        { scope: "row" },
        h("a", { href: to(["runs", run, "trace", rollout.id]) }, visible(rollout.item_id)),
        h("div", { class: "small quiet nowrap" }, `step ${rollout.step}, attempt ${rollout.attempt}`),
      ),
      h("td", { class: "num", "data-label": "Old" }, grade(before)),
      h("td", { class: "num strong", "data-label": "New" }, grade(after)),
      h(
        "td",
        { class: "num", "data-label": "Change" },
        before === null || after === null ? "–" : signed(after - before),
      ),
      h("td", { class: "num nowrap", "data-label": "Took" }, given ? seconds(given.latency_s) : "–"),
      h(
        "td",
        { "data-label": "Details" },
        problem !== null ? h("pre", { class: "text bad-text small" }, visible(problem)) : null,
        errors.map(([flag, detail]) => h("p", { class: "small bad-text" }, visible(flag), ": ", visible(detail))),
        given && (given.parts.length || Object.keys(given.shadow).length)
          ? h("details", null, h("summary", null, given.parts.length ? "Parts" : "Shadow grades"), gradeTree(given))
          : null,
        h("div", { class: "small quiet clamp" }, visible(rollout.opening)),
      ),
    );
  };
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Old and new grades" },
    h(
      "table",
      { class: "cards" },
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          ["Rollout", "Old", "New", "Change", "Took", "Details"].map((name, index) =>
            h("th", { scope: "col", class: index > 0 && index < 5 ? "num" : "" }, name),
          ),
        ),
      ),
      h("tbody", null, graded.map(row)),
    ),
  );
}

function allErrors(given) {
  return [...Object.entries(given.errors), ...given.parts.flatMap(allErrors)];
}
