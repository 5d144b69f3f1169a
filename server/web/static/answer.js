// One answer as it comes: reasoning, text, tokens and calls of tools, and how fast it was.
import { el } from "./dom.js";
import { markdown } from "./markdown.js";
import { TokenView } from "./tokens.js";

export class Answer {
  /** title: who answers. */
  constructor(title) {
    this.title = title;
    this.isJson = false;
    this.content = "";
    this.reasoning = "";
    this.calls = [];
    this.tokens = null;
    this.isRunning = false;
    this.text = el("div", { class: "prose" });
    this.reasoningText = el("div", { class: "reasoning-text" });
    this.reasoningFold = el("details", { class: "reasoning", hidden: true }, el("summary", {}, "Reasoning"), this.reasoningText);
    this.callPlace = el("div", { class: "calls" });
    this.tokenPlace = el("div", { hidden: true });
    this.facts = el("p", { class: "stats" });
    this.actions = el("div", { class: "actions" });
    this.swap = el("button", { type: "button", class: "quiet small", hidden: true, onclick: () => this.swapViews() }, "Show text");
    this.element = el("article", { class: "message assistant", "aria-label": `Answer of ${title}` },
      el("p", { class: "who" }, title), this.reasoningFold, this.text, this.tokenPlace, this.callPlace,
      el("footer", {}, this.facts, this.swap, this.actions));
  }

  /** Show a message that was kept. */
  restore(message) {
    this.content = message.content ?? "";
    this.reasoning = message.reasoning ?? "";
    this.isJson = Boolean(message.isJson);
    this.calls = message.tool_calls ?? [];
    this.facts.textContent = message.facts ?? "";
    this.draw();
  }

  /** Ask a server, and show what comes. Raises what the server says, with what came until then
   * shown; a stop is no error. */
  async run(server, path, body, signal) {
    this.isRunning = true;
    this.isJson = Boolean(body.response_format);
    this.element.setAttribute("aria-busy", "true");
    this.element.classList.add("running");
    const asked = { ...body, stream: true, stream_options: { include_usage: true } };
    const clock = { begun: performance.now(), first: 0, last: 0 };
    let usage = null;
    let ending = "";
    try {
      for await (const event of server.stream(path, asked, signal)) {
        usage = event.usage ?? usage;
        const choice = event.choices?.[0];
        if (!choice) continue;
        if (this.take(choice)) {
          clock.last = performance.now();
          clock.first ||= clock.last;
        }
        ending = choice.finish_reason ?? ending;
        this.drawSoon();
      }
    } catch (error) {
      ending = error.name === "AbortError" ? "stopped" : "broken";
      if (ending === "broken") throw error;
    } finally {
      this.isRunning = false;
      this.element.removeAttribute("aria-busy");
      this.element.classList.remove("running");
      this.draw();
      this.speed = speedOf(clock, usage, this.tokens?.tokens.length, ending);
      this.facts.textContent = this.speed.words;
    }
  }

  /** Add what a choice of an event brings; whether it brought anything. */
  take(choice) {
    const delta = choice.delta ?? { content: choice.text };
    const thought = delta.reasoning ?? delta.reasoning_content ?? "";
    this.reasoning += thought;
    this.content += delta.content ?? "";
    for (const call of delta.tool_calls ?? []) this.takeCall(call);
    const entries = entriesOf(choice.logprobs);
    if (entries.length) {
      if (!this.tokens) {
        this.tokens = new TokenView();
        this.tokenPlace.append(this.tokens.element);
        this.tokenPlace.hidden = false;
        this.text.hidden = true;
        this.swap.hidden = false;
      }
      this.tokens.add(entries);
    }
    return Boolean(thought || delta.content || delta.tool_calls || entries.length);
  }

  takeCall(piece) {
    const call = (this.calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (piece.id) call.id = piece.id;
    call.function.name += piece.function?.name ?? "";
    call.function.arguments += piece.function?.arguments ?? "";
  }

  swapViews() {
    this.text.hidden = !this.text.hidden;
    this.tokenPlace.hidden = !this.text.hidden;
    this.swap.textContent = this.text.hidden ? "Show text" : "Show tokens";
  }

  drawSoon() {
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.text.replaceChildren(...(this.isJson ? [el("pre", { tabindex: 0 }, this.content)] : markdown(this.content)));
    this.reasoningFold.hidden = !this.reasoning;
    if (this.isRunning) this.reasoningFold.open = !this.content;
    this.reasoningText.textContent = this.reasoning;
    this.callPlace.replaceChildren(...this.calls.filter(Boolean).map(callCard));
    this.onDraw?.();
  }

  get isEmpty() {
    return !(this.content || this.reasoning || this.calls.length);
  }

  /** As the server takes it back in the next request, with what only this page keeps. */
  get message() {
    const calls = this.calls.filter(Boolean);
    const message = { role: "assistant", content: this.content || (calls.length ? null : "") };
    if (calls.length) message.tool_calls = calls;
    return { ...message, by: this.title, isJson: this.isJson, reasoning: this.reasoning, facts: this.facts.textContent };
  }
}

/** Log-probabilities of chat's choices, or of completions', as chat's. */
function entriesOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) return logprobs.content;
  return (logprobs.tokens ?? []).map((token, at) => ({
    token,
    logprob: logprobs.token_logprobs[at] ?? 0,
    top_logprobs: Object.entries(logprobs.top_logprobs?.[at] ?? {}).map(([other, logprob]) => ({ token: other, logprob })),
  }));
}

function callCard(call) {
  let said = call.function.arguments;
  try {
    said = JSON.stringify(JSON.parse(said), null, 2);
  } catch {
    // not whole yet
  }
  return el("div", { class: "call" }, el("p", {}, "Calls ", el("code", {}, call.function.name)), el("pre", { tabindex: 0 }, said));
}

function speedOf(clock, usage, numSeen, ending) {
  const count = usage?.completion_tokens ?? numSeen;
  const first = clock.first ? clock.first - clock.begun : null;
  const rate = count > 1 && clock.last > clock.first ? (1000 * (count - 1)) / (clock.last - clock.first) : null;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const words = [
    first === null ? "" : `first token ${first < 1000 ? `${first.toFixed(0)} ms` : `${(first / 1000).toFixed(2)} s`}`,
    rate === null ? "" : `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`,
    count === undefined ? "" : `${count} tokens`,
    usage ? `prompt ${usage.prompt_tokens}${cached ? ` (${cached} cached)` : ""}` : "",
    { length: "cut at the limit", stopped: "stopped", broken: "broke off", abort: "ended by the server", repetition: "ended for repeating itself" }[ending] ?? "",
  ];
  return { first, rate, count, words: words.filter(Boolean).join(" · ") };
}
