// Sends the page's requests to the server and reads its answers. Knows no element of the page.

const KEY = "pixtral-key";
const LOST = "The connection to the server was lost before the answer was complete.";
export const MOST_BYTES = 64 * 2 ** 20;

/** A failure whose message is a sentence for the reader. */
export class Problem extends Error {}

let askForKey = async () => null;

/** `ask(reason)` promises a key, or null when the reader gives none; `reason` says why the last key failed. */
export function whenKeyIsWanted(ask) {
  askForKey = ask;
}

/** The first model that the server names: `{id, max_model_len}`. */
export async function firstModel() {
  const { data } = await (await call("v1/models")).json();
  return data[0];
}

/** What each of these pictures (data: URLs) costs, in their order: `[{width, height, tokens}]`. */
export async function pictureCosts(urls) {
  const body = JSON.stringify({ messages: [{ role: "user", content: urls.map(picturePart) }] });
  return (await (await call("tokenize", { body })).json()).images;
}

export function picturePart(url) {
  return { type: "image_url", image_url: { url } };
}

/** The chunks of a streamed chat completion, until the server says that it is whole. */
export async function* completion(body, signal) {
  const response = await call("v1/chat/completions", { body, signal });
  let whole = false;
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") {
      whole = true; // but read on: leaving now would look like giving up
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Problem(chunk.error.message);
    yield chunk;
  }
  if (!whole) throw new Problem(LOST);
}

async function call(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await reach(path, key, body, signal);
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status !== 401) throw problem;
    const given = await askForKey(key === null ? "" : problem.message);
    if (given === null) throw problem;
    sessionStorage.setItem(KEY, given);
  }
}

async function reach(path, key, body, signal) {
  const headers = {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
  } catch (error) {
    throw signal?.aborted ? error : new Problem("The server cannot be reached. Is it still running?");
  }
}

async function problemOf(response) {
  const said = await response.json().catch(() => null);
  return new Problem(said?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim() + ".");
}

// Server-sent events as the HTML standard defines them: any of three line ends, `data` lines joined, comments
// skipped, an event without its closing blank line dropped. Pieces of the body may end anywhere, in a letter too.
async function* events(body, signal) {
  let rest = "";
  let data = [];
  let cut = false; // whether the last piece ended in \r, and a \n may follow that belongs to it
  for await (const text of texts(body, signal)) {
    const lines = (rest + (cut ? text.replace(/^\n/, "") : text)).split(/\r\n|\n|\r/);
    cut = text.endsWith("\r");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line !== "" || data.length === 0) continue;
      yield data.join("\n");
      data = [];
    }
  }
}

async function* texts(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw signal?.aborted ? error : new Problem(LOST);
      });
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
