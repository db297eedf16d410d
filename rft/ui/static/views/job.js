// A new fine-tuning job, through the same API that programs use. What the server refuses is shown at its field.

import { v1 } from "../api.js";
import { h, newId, plain, swap, visible } from "../dom.js";
import { editor } from "../editor.js";
import { failure, say, setTitle } from "../messages.js";
import { go, to } from "../places.js";

const GRADER = {
  type: "string_check",
  name: "exact",
  input: "{{ sample.output_text }}",
  reference: "{{ item.answer }}",
  operation: "eq",
};
const HYPERPARAMETERS = [
  // [name, label, help]
  ["n_epochs", "Epochs", "a whole number, or auto"],
  ["batch_size", "Batch size", "items per step, or auto"],
  ["learning_rate_multiplier", "Learning rate multiplier", "a number, or auto"],
  ["compute_multiplier", "Compute multiplier", "rollouts per item grow with it, or auto"],
  ["eval_interval", "Evaluate every", "steps, or auto"],
  ["eval_samples", "Samples per evaluated item", "a whole number, or auto"],
];

export async function show(main, place, { signal }) {
  setTitle("New job");
  const fields = {
    model: choice("Base model", "model"),
    training_file: file("Training file (JSONL)", "training_file", { isNeeded: true }),
    validation_file: file("Validation file (JSONL)", "validation_file"),
    suffix: line("Suffix of the tuned model's name", "suffix", "optional: letters, digits, dot, _ and -"),
    seed: line("Seed", "seed", "optional: a whole number"),
    ...Object.fromEntries(
      HYPERPARAMETERS.map(([name, label, help]) => [
        `method.reinforcement.hyperparameters.${name}`,
        line(label, name, help, "auto"),
      ]),
    ),
    "method.reinforcement.hyperparameters.reasoning_effort": choice("Reasoning effort", "reasoning_effort", [
      "default",
      "low",
      "medium",
      "high",
    ]),
  };
  const grader = editor({ label: "Grader as JSON", value: JSON.stringify(GRADER, null, 2), rows: 10 });
  const tools = editor({
    label: "Tools as JSON",
    value: "[]",
    rows: 6,
    help: 'A list of {"name": …, "server_url": …}. Header values are secrets: they are sent and never shown again.',
  });
  fields["method.reinforcement.grader"] = grader;
  fields["method.reinforcement.tools"] = tools;

  const problem = h("div", null);
  const status = h("p", { class: "small quiet", role: "status" });
  const button = h("button", { type: "submit", class: "primary" }, "Create the job");
  const reset = () => Object.values(fields).forEach((field) => field.complain(""));

  async function create(event) {
    event.preventDefault();
    reset();
    swap(problem);
    if (!isComplete(fields, grader, tools)) return;
    button.disabled = true;
    try {
      const files = {};
      for (const name of ["training_file", "validation_file"]) {
        status.textContent = "Sending the files";
        if (fields[name].chosen()) files[name] = await upload(fields[name], name, signal);
      }
      status.textContent = "Creating the job";
      const job = await v1.post("fine_tuning/jobs", body(fields, files, grader, tools), { signal });
      say("The job is created.");
      go(to([]));
      return job;
    } catch (error) {
      if (signal.aborted) return;
      complainAt(fields, error, problem);
    }
    status.textContent = "";
    button.disabled = false;
  }

  const section = (title, ...inside) => h("fieldset", { class: "card stack" }, h("legend", null, title), inside);
  const names = HYPERPARAMETERS.map(([name]) => `method.reinforcement.hyperparameters.${name}`);
  swap(
    main,
    h("h1", null, "New job"),
    h(
      "form",
      { class: "stack job", onsubmit: create, novalidate: "" },
      section(
        "Model and data",
        fields.model.element,
        h("div", { class: "two" }, fields.training_file.element, fields.validation_file.element),
        h("div", { class: "two" }, fields.suffix.element, fields.seed.element),
      ),
      section("Grader", grader.element),
      section("Tools", tools.element),
      section(
        "Hyperparameters",
        h(
          "div",
          { class: "three" },
          names.map((name) => fields[name].element),
          fields["method.reinforcement.hyperparameters.reasoning_effort"].element,
        ),
      ),
      problem,
      h("div", { class: "bar" }, button, status),
    ),
  );
  try {
    const { data } = await v1.get("models", { signal });
    fields.model.offer(data.map((model) => model.id));
  } catch (error) {
    if (!signal.aborted) swap(problem, failure(error));
  }
}

function isComplete(fields, grader, tools) {
  const first = (field, message) => {
    field.complain(message);
    field.focus?.();
    field.area?.focus();
    return false;
  };
  if (!fields.model.value()) return first(fields.model, "Choose a model.");
  if (!fields.training_file.chosen()) return first(fields.training_file, "Choose a file.");
  const given = grader.parsed();
  if (given === null || typeof given !== "object" || Array.isArray(given))
    return first(grader, "The grader is not a JSON object.");
  if (tools.value().trim() && !Array.isArray(tools.parsed())) return first(tools, "The tools are not a JSON list.");
  return true;
}

function body(fields, files, grader, tools) {
  const number = (text) => (text !== "" && Number.isFinite(Number(text)) ? Number(text) : text);
  const prefix = "method.reinforcement.hyperparameters.";
  const names = Object.keys(fields).filter((name) => name.startsWith(prefix));
  const hyperparameters = Object.fromEntries(
    names
      .map((name) => [name.slice(prefix.length), number(fields[name].value())])
      .filter(([, value]) => value !== "" && value !== "auto"),
  );
  const list = tools.value().trim() ? tools.parsed() : [];
  return {
    model: fields.model.value(),
    ...files,
    ...(fields.suffix.value() ? { suffix: fields.suffix.value() } : {}),
    ...(fields.seed.value() ? { seed: number(fields.seed.value()) } : {}),
    method: {
      type: "reinforcement",
      reinforcement: { grader: grader.parsed(), ...(list.length ? { tools: list } : {}), hyperparameters },
    },
  };
}

/** The id of the file; one that is there already is not sent again. */
async function upload(field, name, signal) {
  const chosen = field.chosen();
  if (field.sent?.file === chosen) return field.sent.id;
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", chosen, chosen.name);
  try {
    const { id } = await v1.post("files", form, { signal });
    field.sent = { file: chosen, id };
    return id;
  } catch (error) {
    error.param = name;
    throw error;
  }
}

function complainAt(fields, error, problem) {
  const param = error.param ?? "";
  const name = Object.keys(fields)
    .filter((one) => param === one || param.startsWith(`${one}.`))
    .sort((a, b) => b.length - a.length)[0];
  if (!name) return swap(problem, failure(error));
  const place = param === name ? "" : `${param.slice(name.length + 1)}: `;
  fields[name].complain(`${place}${plain(error.message)}`);
  (fields[name].area ?? fields[name]).focus();
  return swap(
    problem,
    h("p", { class: "note bad", role: "alert" }, "The server refused it: see ", visible(param), "."),
  );
}

// --- fields ---

function field(label, control, help = null) {
  const id = control.id;
  const problem = h("p", { class: "problem", id: `${id}-problem`, "aria-live": "polite" });
  control.setAttribute("aria-describedby", help ? `${id}-help ${id}-problem` : `${id}-problem`);
  const element = h(
    "div",
    { class: "field" },
    h("label", { for: id }, label),
    control,
    help ? h("p", { class: "small quiet", id: `${id}-help` }, help) : null,
    problem,
  );
  return {
    element,
    value: () => control.value.trim(),
    focus: () => control.focus(),
    complain(message) {
      problem.textContent = message;
      if (message) control.setAttribute("aria-invalid", "true");
      else control.removeAttribute("aria-invalid");
    },
  };
}

function line(label, name, help, value = "") {
  return field(
    label,
    h("input", { type: "text", id: newId("field"), name, value, autocomplete: "off", spellcheck: "false" }),
    help,
  );
}

function choice(label, name, values = []) {
  const control = h("select", { id: newId("field"), name });
  const offer = (found) =>
    swap(
      control,
      found.map((value) => h("option", { value }, plain(value))),
    );
  offer(values);
  return { ...field(label, control), offer };
}

function file(label, name, { isNeeded = false } = {}) {
  const control = h("input", { type: "file", id: newId("field"), name, accept: ".jsonl", required: isNeeded });
  return { ...field(label, control), chosen: () => control.files[0] ?? null, sent: null };
}
