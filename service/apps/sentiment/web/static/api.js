// Calls to the page's own server, and reading its server-sent events.

/** What the server, or its absence, said: `code` for the page, `message` for a person. */
export class ApiError extends Error {
  constructor({ code, message, retry_after_s = null }) {
    super(message);
    this.code = code;
    this.retryAfter = retry_after_s;
  }
}

const OFFLINE = { code: "offline", message: "this page’s own server does not answer" };

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(OFFLINE);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ApiError(
    said?.error ?? { code: "failed", message: `the server answered ${response.status}` },
  );
}

export async function getState(signal) {
  return (await request("/api/state", { signal })).json();
}

export async function countTokens(text, template, signal) {
  const response = await request("/api/tokens", json({ text, template }, signal));
  return (await response.json()).tokens;
}

/** Events of an answer: [name, fields] pairs. Aborting `signal` ends the work on the server. */
export async function* classify(text, template, seed, signal) {
  yield* events(await request("/api/classify", json({ text, template, seed }, signal)));
}

export async function inspectTable(content, header) {
  const query = header === null ? "" : `?header=${Number(header)}`;
  return (await request(`/api/table${query}`, csv(content))).json();
}

export async function* classifyTable(content, query, signal) {
  const path = `/api/table/classify?${new URLSearchParams(query)}`;
  yield* events(await request(path, { ...csv(content), signal }));
}

function json(fields, signal) {
  return {
    method: "POST",
    headers: { "content-type": "application/json" },
    // A seed may be larger than a number of JavaScript's is exact: it is sent as its digits.
    body: JSON.stringify(fields),
    signal,
  };
}

function csv(content) {
  return { method: "POST", headers: { "content-type": "text/csv" }, body: content };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let ended = false;
  try {
    while (true) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(OFFLINE);
      }
      if (piece.done) break;
      buffer += piece.value;
      const blocks = buffer.split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event === null) continue;
        const [name, fields] = event;
        if (name === "error") throw new ApiError(fields);
        ended ||= name === "result" || name === "end";
        yield event;
      }
    }
    if (!ended) throw new ApiError(OFFLINE);
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** [name, fields] of one block of an event stream; null for a comment. */
export function parse(block) {
  let name = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? [name, JSON.parse(data.join("\n"))] : null;
}
