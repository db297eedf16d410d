// Questions to the user in <dialog>: is that meant, and which key.

import { h, newId } from "./dom.js";

/** Resolves to the button's value, or "" where the dialog was left. */
function ask(title, body, buttons, { onClose = () => {} } = {}) {
  const id = newId("dialog");
  const form = h(
    "form",
    { method: "dialog" },
    h("h2", { id }, title),
    body,
    h(
      "div",
      { class: "actions" },
      buttons.map(([value, label, look]) => h("button", { value, class: look, type: "submit" }, label)),
    ),
  );
  const dialog = h("dialog", { "aria-labelledby": id }, form);
  const before = document.activeElement;
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const value = dialog.returnValue;
      onClose(value);
      dialog.remove();
      before?.focus?.();
      resolve(value);
    });
  });
}

/** True when the user says yes. */
export async function confirmed(title, text, yes, { isDangerous = false } = {}) {
  const buttons = [
    ["", "Keep as it is", "plain"],
    ["yes", yes, isDangerous ? "danger" : "primary"],
  ];
  return (await ask(title, h("p", null, text), buttons)) === "yes";
}

/** The key, or null when the user gives none. */
export async function askedKey(reason) {
  const input = h("input", {
    type: "password",
    id: newId("key"),
    name: "key",
    autocomplete: "off",
    spellcheck: "false",
  });
  const body = [
    h("p", null, "This server shows runs to holders of a key. It stays in this tab and is forgotten with it."),
    reason ? h("p", { class: "note bad", role: "alert" }, reason) : null,
    h("label", { class: "field" }, h("span", null, "API key"), input),
  ];
  // The first button is what Enter in the field presses.
  const value = await ask("Key needed", h("div", null, body), [
    ["yes", "Use this key", "primary"],
    ["", "Not now", "plain"],
  ]);
  return value === "yes" && input.value.trim() ? input.value.trim() : null;
}
