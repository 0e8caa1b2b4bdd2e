// Requests to the server, with the key that the user has given. The key is in this tab's session
// storage and nowhere else.

const STORED = "crosspool-key";
const LOOK_MS = 5000;

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

/** The server's response; raises ServerError where that is a refusal or nothing came at all. */
export async function ask(method, path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      signal,
      cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "the server does not answer");
  }
  if (!response.ok) throw new ServerError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with ${response.status}`;
  }
}

export async function status() {
  const response = await ask("GET", "crosspool/status", { signal: AbortSignal.timeout(LOOK_MS) });
  try {
    return await response.json();
  } catch {
    throw new ServerError(0, "the server's answer broke off");
  }
}

const place = (name) => `crosspool/models/${name.split("/").map(encodeURIComponent).join("/")}`;

export const wake = (name) => ask("POST", `${place(name)}/wake`);
export const sleep = (name) => ask("POST", `${place(name)}/sleep`);
export const pin = (name, keep) => ask("POST", `${place(name)}/pin`, { body: { keep } });
export const unload = (name) => ask("DELETE", place(name));
export const load = (options) => ask("POST", "crosspool/models", { body: options });

/** Lane events of all devices over the next `ms` milliseconds. */
export async function record(ms) {
  await ask("POST", "crosspool/trace/start");
  await new Promise((done) => setTimeout(done, ms));
  return (await ask("POST", "crosspool/trace/stop")).json();
}

/** Yields the objects that a chat completion streams. */
export async function* chat(body, signal) {
  const response = await ask("POST", "v1/chat/completions", { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (unread + value).split("\n");
    unread = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "" || data === "[DONE]") continue;
      const told = JSON.parse(data);
      if (told.error) throw new ServerError(Number(told.error.code) || 500, told.error.message);
      yield told;
    }
  }
}
