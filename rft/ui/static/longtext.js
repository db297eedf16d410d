// A text that may be long: its beginning, and the rest in pieces when the user asks for it.

import { get, runPath } from "./api.js";
import { h, visible } from "./dom.js";
import { count } from "./format.js";

const CUT = 1500; // characters shown before "show more", though more came with the answer

/** `text` is a schema.Text; the rest of it is fetched by its `ref`. `mark`: spaces and code are shown as written. */
export function longText(text, { run, rollout, label, signal, cut = CUT }) {
  if (!text || text.num_chars === 0) return h("p", { class: "quiet small" }, "empty");
  const box = h("div", { class: "text" });
  const controls = h("div", { class: "text-more" });
  let shown = Math.min(cut, text.text.length);
  let loaded = text.text;
  box.append(visible(loaded.slice(0, shown)));

  const more = h("button", { type: "button", class: "link", onclick: () => advance() });
  const left = () => text.num_chars - shown;
  function renew() {
    more.replaceChildren(`Show more of ${label} (${count(left(), "character")} left)`);
    if (left() > 0) controls.replaceChildren(more);
    else controls.replaceChildren();
  }
  async function advance() {
    more.disabled = true;
    try {
      if (shown >= loaded.length) loaded += await next(loaded.length);
      const until = Math.max(shown, loaded.length);
      box.append(visible(loaded.slice(shown, until)));
      shown = until;
      renew();
    } catch (error) {
      if (!signal?.aborted) controls.append(h("p", { class: "note bad", role: "alert" }, error.message));
    }
    more.disabled = false;
  }
  async function next(offset) {
    const path = runPath(run, "rollouts", rollout, "texts", text.ref);
    const part = await get(path, { query: { offset }, signal });
    if (!part.text) text.num_chars = offset; // the rest is gone
    return part.text;
  }
  renew();
  return h("div", { class: "long" }, box, controls);
}

/** The same, folded away behind a summary that says how long it is. */
export function folded(summary, text, options, { open = false } = {}) {
  if (!text) return null;
  const heading = h("summary", null, summary, h("span", { class: "small quiet" }, ` ${count(text.num_chars, "character")}`));
  return h("details", { open }, heading, longText(text, options));
}
