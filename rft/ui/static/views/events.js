// What the run said of itself, the newest first.

import { h, swap, visible } from "../dom.js";
import { time } from "../format.js";

export function show(panel, place, { view }) {
  const draw = () => {
    const events = [...view().events].reverse();
    if (!events.length) return swap(panel, h("p", { class: "empty" }, "The run has said nothing yet."));
    const rows = events.map((event) =>
      h(
        "li",
        { class: "event", "data-level": event.level },
        h("time", { class: "small quiet" }, time(event.time)),
        h("span", { class: "level" }, visible(event.level)),
        h("div", { class: "event-text" }, visible(event.message)),
      ),
    );
    return swap(panel, h("h2", { class: "sr" }, "Events"), h("ol", { class: "events" }, rows));
  };
  draw();
  return { renew: draw };
}
