// A text that may be long: its beginning, and the rest in pieces when the user asks for it.

import { get, runPath } from "./api.js";
import { h, visible } from "./dom.js";
import { count } from "./format.js";

const CUT = 1500; // characters shown before "show more", though more came with the answer

/** `text` is a schema.Text; the rest of it is fetched by its `ref`. Characters are code points, as the server counts. */
export function longText(text, { run, rollout, label, signal, cut = CUT }) {
  if (!text || text.num_chars === 0) return h("p", { class: "quiet small" }, "empty");
  let waiting = Array.from(text.text); // what has come and is not shown
  let numShown = 0;
  let numChars = text.num_chars;
  const box = h("div", { class: "text" });
  const controls = h("div", { class: "text-more" });
  const more = h("button", { type: "button", class: "link", onclick: () => advance() });

  function reveal(num) {
    const part = waiting.slice(0, num);
    waiting = waiting.slice(num);
    numShown += part.length;
    box.append(visible(part.join("")));
    const left = numChars - numShown;
    more.replaceChildren(`Show more of ${label} (${count(left, "character")} left)`);
    controls.replaceChildren(...(left > 0 ? [more] : []));
  }
  async function advance() {
    more.disabled = true;
    try {
      if (!waiting.length) await load();
      reveal(waiting.length);
    } catch (error) {
      if (!signal?.aborted) controls.append(h("p", { class: "note bad", role: "alert" }, error.message));
    }
    more.disabled = false;
  }
  async function load() {
    const path = runPath(run, "rollouts", rollout, "texts", text.ref);
    const part = await get(path, { query: { offset: numShown }, signal });
    waiting = Array.from(part.text);
    if (!waiting.length) numChars = numShown; // the rest is gone
  }
  reveal(cut);
  return h("div", { class: "long" }, box, controls);
}

/** The same, folded away behind a summary that says how long it is. */
export function folded(summary, text, options, { open = false } = {}) {
  if (!text) return null;
  const heading = h(
    "summary",
    null,
    summary,
    h("span", { class: "small quiet" }, ` ${count(text.num_chars, "character")}`),
  );
  return h("details", { open }, heading, longText(text, options));
}
