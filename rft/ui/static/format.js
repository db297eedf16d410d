// Numbers, times and words as a person reads them.

const GAP = "–";

export function number(value, digits = 3) {
  if (value === null || value === undefined) return GAP;
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size > 0 && size < 10 ** -digits) return value.toExponential(1);
  return value.toFixed(size >= 100 ? 1 : digits);
}

export const grade = (value) => (value === null || value === undefined ? GAP : value.toFixed(3));

export const signed = (value) =>
  value === null || value === undefined ? GAP : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

export function seconds(value) {
  if (value === null || value === undefined) return GAP;
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.1 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 120) return `${minutes} min ${Math.round(value % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const percent = (share) => `${Math.floor(share * 100)}%`;

export function time(unix) {
  if (!unix) return GAP;
  const date = new Date(unix * 1000);
  const two = (value) => String(value).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

export function ago(unix, now = Date.now() / 1000) {
  if (!unix) return GAP;
  const passed = Math.max(0, now - unix);
  if (passed < 90) return `${Math.round(passed)} s ago`;
  if (passed < 5400) return `${Math.round(passed / 60)} min ago`;
  return passed < 129_600 ? `${Math.round(passed / 3600)} h ago` : `${Math.round(passed / 86_400)} days ago`;
}

export const count = (num, one, many = `${one}s`) => `${num.toLocaleString("en")} ${num === 1 ? one : many}`;

export const words = (name) => String(name).replaceAll("_", " ");
