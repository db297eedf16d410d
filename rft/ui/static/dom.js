// Elements. Text becomes text nodes and attributes come from a list: nothing that is shown can become markup.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "circle", "line", "rect", "g"]);
const ATTRIBUTES = new Set(
  (
    "id class type name value for title tabindex role lang dir colspan rowspan scope min max step " +
    "placeholder rows cols wrap spellcheck autocomplete accept maxlength inputmode download method novalidate " +
    "viewBox d cx cy r x x1 x2 y y1 y2 width height points fill stroke preserveAspectRatio focusable"
  ).split(" "),
);
const PROPERTIES = new Set("disabled checked selected open hidden required readOnly multiple indeterminate".split(" "));

/** An element. Attributes: names of the list, aria-*, data-*, `href` inside this page, `style` as an object of CSS
 * properties, `onclick` and the like as functions. Children: nodes, texts, arrays; null and false are left out. */
export function h(tag, attributes, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) setAttribute(element, name, value);
  element.append(...nodes(children));
  return element;
}

function setAttribute(element, name, value) {
  if (value === null || value === undefined) return;
  if (name.startsWith("on") && typeof value === "function") element.addEventListener(name.slice(2), value);
  else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
  else if (PROPERTIES.has(name)) element[name] = Boolean(value);
  else if (name === "href") element.setAttribute("href", inside(value));
  else if (ATTRIBUTES.has(name) || /^(aria|data)-[a-z-]+$/.test(name)) element.setAttribute(name, String(value));
  else throw new Error(`attribute ${name} is not on the list`);
}

function inside(address) {
  if (!/^(#|\/ui\/|blob:)/.test(address)) throw new Error("a link leads out of the page");
  return address;
}

function nodes(children) {
  return children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false && child !== "")
    .map((child) => (child instanceof Node ? child : document.createTextNode(String(child))));
}

/** New children of a parent. What has a `data-key` keeps the focus, or stays open, across the change. */
export function swap(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const key = focused?.dataset?.key;
  const open = [...parent.querySelectorAll("details[open][data-key]")].map((element) => element.dataset.key);
  parent.replaceChildren(...nodes(children));
  for (const one of open) keyed(parent, one)?.setAttribute("open", "");
  if (key) keyed(parent, key)?.focus({ preventScroll: true });
  return parent;
}

const keyed = (parent, key) => parent.querySelector(`[data-key="${CSS.escape(key)}"]`);

let numIds = 0;
/** An id that no other element has. */
export function newId(prefix) {
  numIds += 1;
  return `${prefix}-${numIds}`;
}

// --- hostile text ---

// Controls, marks of direction, unassigned characters and half surrogates; new lines and tabs are text.
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}]/u;
const HIDDEN_RUN = /((?:(?![\n\t])[\p{C}\p{Zl}\p{Zp}])+)/u;
const MAX_MARKS = 2000;

function codes(text) {
  return Array.from(text, (letter) => {
    const code = letter.codePointAt(0);
    if (code < 0x100) return `\\x${code.toString(16).padStart(2, "0")}`;
    return code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`;
  }).join("");
}

/** The text with every character that has no glyph as its code, like \x1b: for attributes, options and charts. */
export function plain(text) {
  const given = String(text ?? "");
  if (!HIDDEN.test(given)) return given;
  return given
    .split(HIDDEN_RUN)
    .map((part, index) => (index % 2 ? codes(part) : part))
    .join("");
}

/** The same as an element whose direction stays inside, with the codes marked. */
export function visible(text) {
  const given = String(text ?? "");
  if (!HIDDEN.test(given)) return h("bdi", null, given);
  const parts = given.split(HIDDEN_RUN);
  if (parts.length > MAX_MARKS) return h("bdi", null, plain(given));
  return h(
    "bdi",
    null,
    parts.map((part, index) => (index % 2 ? h("span", { class: "code-point" }, codes(part)) : part)),
  );
}
