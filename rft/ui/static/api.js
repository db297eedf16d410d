// Requests to this page's own server, with the key that the user gave. The key lives in sessionStorage, nowhere else.

const API = new URL("../api/", import.meta.url);
const V1 = new URL("../../v1/", import.meta.url);
const KEY = "rft-key";
const TIMEOUT_MS = 60_000;
const WAIT_MS = 1000;
const LONGEST_WAIT_MS = 15_000;

/** What the server refused. `param` is the field that is wrong; status 0: there was no answer. */
export class ApiError extends Error {
  constructor(message, status, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Below /ui/api. `query`: an object; empty values are left out. */
export function get(path, { query = {}, signal } = {}) {
  const url = new URL(path, API);
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") url.searchParams.set(name, value);
  }
  return request(url, { signal });
}

export function post(path, body, { signal } = {}) {
  return request(new URL(path, API), { method: "POST", body: body ?? {}, signal });
}

/** The path of a run, or of what is below it. */
export function runPath(run, ...rest) {
  return ["runs", run, ...rest].map(encodeURIComponent).join("/");
}

export const v1 = {
  get: (path, options = {}) => request(new URL(path, V1), options),
  post: (path, body, options = {}) => request(new URL(path, V1), { ...options, method: "POST", body }),
};

async function request(url, { method = "GET", body, signal } = {}) {
  const headers = { accept: "application/json" };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const isForm = body instanceof FormData;
  if (body !== undefined && !isForm) headers["content-type"] = "application/json";
  const limit = AbortSignal.timeout(isForm ? 10 * TIMEOUT_MS : TIMEOUT_MS);
  const options = { method, headers, body: body === undefined || isForm ? body : JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(url, {
      ...options,
      cache: "no-store",
      signal: signal ? AbortSignal.any([signal, limit]) : limit,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(limit.aborted ? "the server did not answer in time" : "the server does not answer", 0);
  }
  const found = await answer.json().catch(() => null);
  if (answer.ok) return found;
  const problem = refusal(found, answer.status);
  if (answer.status === 401) window.dispatchEvent(new CustomEvent("rft:key", { detail: problem.message }));
  throw problem;
}

function refusal(found, status) {
  const error = found?.error;
  if (error && typeof error === "object") return new ApiError(String(error.message), status, error.param ?? null);
  const detail = found?.detail;
  if (Array.isArray(detail) && detail.length) {
    const { loc = [], msg } = detail[0];
    return new ApiError(String(msg), status, loc.slice(1).join("."));
  }
  return new ApiError(String(detail ?? `the server answered ${status}`), status);
}

/** Calls `look` now and then every second while the tab is visible, until it returns false or `signal` ends it.
 * What fails is tried again, later and later; `onLost(true)` and `onLost(false)` say when that begins and ends. */
export async function follow(look, { signal, onLost = () => {}, waitMs = WAIT_MS }) {
  let numFailures = 0;
  while (!signal.aborted) {
    await untilVisible(signal);
    if (signal.aborted) return;
    try {
      const goesOn = await look();
      if (numFailures) onLost(false);
      numFailures = 0;
      if (goesOn === false) return;
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      if ([401, 403, 404].includes(error.status)) return; // asking again changes nothing
      numFailures += 1;
      if (error.status === 0 || error.status >= 500) onLost(true);
    }
    await pause(Math.min(waitMs * 2 ** numFailures, Math.max(waitMs, LONGEST_WAIT_MS)), signal);
  }
}

function untilVisible(signal) {
  if (!document.hidden) return null;
  return new Promise((resolve) => {
    const done = () => {
      document.removeEventListener("visibilitychange", done);
      resolve();
    };
    document.addEventListener("visibilitychange", done);
    signal.addEventListener("abort", done, { once: true });
  });
}

export function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
