// The form above the table of rollouts. It changes the address; the address changes the table.

import { h, newId, plain, swap } from "../dom.js";
import { words } from "../format.js";

export const FILTERS = [
  "text",
  "step_from",
  "step_to",
  "split",
  "item",
  "grade_min",
  "grade_max",
  "stop",
  "tool",
  "error",
  "step",
];
const DELAY_MS = 350;

/** `onChange({name: value})` with what changed; `set(query)` shows a query, `offer(choices)` what can be chosen. */
export function filterForm(query, onChange) {
  const fields = {
    text: input("Text said, called or returned", { type: "search" }),
    step_from: input("Step from", { type: "number", min: 0, inputmode: "numeric" }),
    step_to: input("to", { type: "number", min: 0, inputmode: "numeric" }, "Step to"),
    grade_min: input("Grade from", { type: "number", step: "any" }),
    grade_max: input("to", { type: "number", step: "any" }, "Grade to"),
    split: choice("Split"),
    stop: choice("Ended by"),
    tool: choice("Tool"),
    item: input("Item", { type: "text" }),
    error: input("Error", { type: "text" }),
  };
  let timer = null;
  let values = { ...query };
  const unsent = new Set(); // what the user is still typing; the address does not overwrite it
  const send = () => {
    clearTimeout(timer);
    unsent.clear();
    const found = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.control.value.trim()]));
    const changed = Object.fromEntries(Object.entries(found).filter(([name, value]) => value !== (values[name] ?? "")));
    if (!Object.keys(changed).length) return;
    values = { ...values, ...changed };
    onChange(changed);
  };
  const typed = (name) => {
    unsent.add(name);
    clearTimeout(timer);
    timer = setTimeout(send, DELAY_MS);
  };
  for (const [name, { control }] of Object.entries(fields)) {
    control.addEventListener("change", send);
    control.addEventListener("input", () => typed(name));
  }
  const clear = h("button", { type: "button", class: "plain", onclick: () => clearAll() }, "Clear filters");
  function clearAll() {
    clearTimeout(timer);
    unsent.clear();
    set({});
    onChange(Object.fromEntries(FILTERS.map((name) => [name, ""])));
  }
  function set(next) {
    values = { ...next };
    for (const [name, { control }] of Object.entries(fields)) {
      const value = next[name] ?? "";
      if (unsent.has(name) || control.value.trim() === value) continue;
      if (control instanceof HTMLSelectElement) offerValue(control, value);
      control.value = value;
    }
    clear.hidden = !FILTERS.some((name) => next[name]);
  }
  function offer(choices) {
    options(fields.split.control, choices.splits);
    options(fields.stop.control, choices.stop_reasons);
    options(fields.tool.control, choices.tools);
    const [first, last] = choices.steps ?? ["", ""];
    fields.step_from.control.placeholder = String(first);
    fields.step_to.control.placeholder = String(last);
  }
  const form = h(
    "form",
    {
      class: "filters",
      role: "search",
      "aria-label": "Filter rollouts",
      onsubmit: (event) => (event.preventDefault(), send()),
    },
    Object.entries(fields).map(([name, field]) =>
      h("div", { class: `filter filter-${name.replace("_", "-")}` }, field.label),
    ),
    clear,
  );
  set(query);
  return {
    element: folding(
      form,
      FILTERS.some((name) => query[name]),
    ),
    set,
    offer,
  };
}

/** On a narrow screen the filters are folded away until they are wanted. */
function folding(form, isUsed) {
  const narrow = matchMedia("(max-width: 700px)");
  const box = h(
    "details",
    { class: "filters-box", open: isUsed || !narrow.matches },
    h("summary", null, "Filters"),
    form,
  );
  narrow.addEventListener("change", () => {
    box.open ||= !narrow.matches;
  });
  return box;
}

function input(label, attributes, name = null) {
  const control = h("input", { id: newId("filter"), autocomplete: "off", "aria-label": name, ...attributes });
  return { control, label: h("label", { class: "field", for: control.id }, h("span", null, label), control) };
}

function choice(label) {
  const control = h("select", { id: newId("filter") }, h("option", { value: "" }, "any"));
  return { control, label: h("label", { class: "field", for: control.id }, h("span", null, label), control) };
}

function options(select, values) {
  const { value } = select;
  const known = [...select.options].slice(1).map((option) => option.value);
  if (known.join("\n") !== values.join("\n"))
    swap(
      select,
      h("option", { value: "" }, "any"),
      values.map((one) => h("option", { value: one }, words(plain(one)))),
    );
  offerValue(select, value);
  select.value = value;
}

/** A value that an address names can be chosen before the choices are known. */
function offerValue(select, value) {
  if (value && ![...select.options].some((option) => option.value === value))
    select.append(h("option", { value }, words(plain(value))));
}
