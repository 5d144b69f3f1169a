// A server of OpenAI's API, this one or another: its routes, its errors, and its streams.
import { kept, keep } from "./dom.js";

const BROKEN = "The answer broke off: the connection to the server ended before it was whole.";

/** What a server said, or why it said nothing. */
class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export class Server {
  /** base: a URL that ends in a slash, without v1. getKey: the key to send, or "". */
  constructor(base, getKey) {
    this.base = base;
    this.getKey = getKey;
  }

  /** The response of a route; raises ServerError for any but 2xx. */
  async ask(path, options = {}) {
    const headers = { ...options.headers };
    const key = this.getKey();
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(new URL(path, this.base), { ...options, headers, credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(this.silence());
    }
    if (!response.ok) throw new ServerError(await said(response), response.status);
    return response;
  }

  async json(path) {
    return (await this.ask(path)).json();
  }

  async modelNames() {
    return (await this.json("v1/models")).data.map((model) => model.id);
  }

  /** The events of a streamed answer. Raises ServerError for an error, in the stream too. */
  async *stream(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    const response = await this.ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message ?? String(event.error));
        yield event;
      }
    } catch (error) {
      if (error instanceof TypeError) throw new ServerError(BROKEN); // as browsers say that a connection is gone
      throw error;
    }
    throw new ServerError(BROKEN); // a proxy closes well what its server did not
  }

  silence() {
    if (this.base === own.base) return "The server does not answer.";
    return (
      `${this.base} does not answer this page: either no server is there, or it does not allow this page's origin. ` +
      `octavo does with --allowed-origins '["${location.origin}"]'.`
    );
  }
}

/** The server that this page is of. Its key is kept in this tab alone. */
export const own = new Server(new URL("./", document.baseURI).href, () => kept("key", ""));

/** An empty key is none. */
export function setKey(key) {
  keep("key", key);
}

/** A server from what a person typed: with or without a scheme, /v1 or a slash. */
export function serverAt(typed, getKey) {
  const text = typed.trim().replace(/\/+$/, "").replace(/\/v1$/, "");
  const url = new URL(/^https?:\/\//i.test(text) ? text : `http://${text}`);
  return new Server(`${url.href.replace(/\/+$/, "")}/`, getKey);
}

async function said(response) {
  const text = await response.text();
  try {
    const body = JSON.parse(text);
    const message = body.error?.message ?? body.message ?? body.detail ?? body.error;
    if (message) return typeof message === "string" ? message : JSON.stringify(message);
  } catch {
    // not JSON: a proxy's own words
  }
  return `HTTP ${response.status}${text ? `: ${text.slice(0, 200)}` : ""}`;
}

/** The data of server-sent events, out of a stream of bytes. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pending += value;
      const lines = pending.split(/\r?\n/);
      pending = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // who reads no further wants the server to stop
  }
}
