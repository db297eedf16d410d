// Where the user is: the part of the address behind `#`, as a path and a query, and links to other places.

/** "#/runs/a/rollouts?step_from=3" -> {parts: ["runs", "a", "rollouts"], query: {step_from: "3"}} */
export function here() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const parts = path.split("/").filter(Boolean).map(decoded);
  return { parts, query: Object.fromEntries(new URLSearchParams(query)) };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** A link to a place; empty values of the query are left out. */
export function to(parts, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const rest = new URLSearchParams(given).toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${rest ? `?${rest}` : ""}`;
}

/** Go there; `replace` leaves no entry to come back to. */
export function go(place, { replace = false } = {}) {
  if (replace) location.replace(place);
  else location.hash = place;
}
