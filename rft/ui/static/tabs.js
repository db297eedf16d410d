// Tabs as links to places: arrow keys move between them, each has its own address.

import { h } from "./dom.js";

/** `tabs`: [name, label, address]; `panel` is the element that they show. */
export function tabBar(label, tabs, chosen, panel) {
  const links = tabs.map(([name, text, address]) => {
    const isChosen = name === chosen;
    const state = { "aria-selected": isChosen, "aria-controls": panel.id, tabindex: isChosen ? 0 : -1 };
    return h(
      "a",
      { role: "tab", id: `tab-${name}`, class: "tab", href: address, "data-key": `tab-${name}`, ...state },
      text,
    );
  });
  panel.setAttribute("role", "tabpanel");
  panel.setAttribute("aria-labelledby", `tab-${chosen}`);
  return h(
    "div",
    { role: "tablist", class: "tabs", "aria-label": label, onkeydown: (event) => moved(event, links) },
    links,
  );
}

function moved(event, links) {
  const at = links.indexOf(document.activeElement);
  const steps = { ArrowRight: 1, ArrowLeft: -1 };
  let next = null;
  if (event.key in steps) next = (at + steps[event.key] + links.length) % links.length;
  else if (event.key === "Home") next = 0;
  else if (event.key === "End") next = links.length - 1;
  if (event.key === " " && at >= 0) next = at;
  if (next === null) return;
  event.preventDefault();
  links[next].focus();
  if (next !== at || event.key === " ") links[next].click();
}
