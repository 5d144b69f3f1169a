// The conversation: what was said, asking for the next answer, stopping it, and giving results of calls.
import { Answer } from "./answer.js";
import { announce, byId, copy, el, keep, kept } from "./dom.js";
import { own } from "./server.js";

const STARTERS = [
  "Explain what quantizing a language model to 8 bits changes, in three sentences.",
  "Write a haiku about a printing press.",
  "List five uses for a spare GPU.",
];

export class Chat {
  /** model: tells which one is chosen; onError: is told what could not be asked. */
  constructor(settings, model, onError) {
    this.settings = settings;
    this.model = model;
    this.onError = onError;
    this.canChat = true;
    this.messages = kept("conversation", []);
    this.thread = byId("thread");
    this.prompt = byId("prompt");
    this.welcome = byId("welcome");
    this.aborter = null;
    this.wire();
    this.draw();
  }

  wire() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    this.prompt.addEventListener("input", () => this.grow());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.clear());
    byId("curl").addEventListener("click", () => {
      try {
        copy(this.curl());
      } catch (error) {
        this.onError(error);
      }
    });
    byId("starters").append(
      ...STARTERS.map((text) => el("button", { type: "button", class: "starter", onclick: () => this.write(text) }, text)),
    );
  }

  learn(info) {
    this.canChat = info.can_chat !== false;
    byId("welcome-about").textContent = this.canChat
      ? `Its context holds ${info.max_model_len.toLocaleString("en")} tokens. Nothing that you write leaves this server.`
      : "It has no chat template, so each message is a text that it goes on writing.";
  }

  write(text) {
    this.prompt.value = text;
    this.grow();
    this.prompt.focus();
  }

  grow() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight + 2, 240)}px`;
  }

  clear() {
    this.stop();
    this.setBusy(null); // not when the stop has gone through: another message may be sent by then
    this.messages = [];
    this.save();
    this.draw();
    announce("New conversation");
    this.prompt.focus();
  }

  stop() {
    this.aborter?.abort();
  }

  save() {
    keep("conversation", this.messages);
  }

  send() {
    const text = this.prompt.value;
    if (!text.trim() || this.aborter) return;
    this.prompt.value = "";
    this.grow();
    this.messages.push({ role: "user", content: text });
    this.draw();
    this.answer();
  }

  /** Ask for an answer to what has been said. */
  async answer() {
    let body;
    try {
      body = this.settings.body({ isChat: this.canChat });
    } catch (error) {
      this.giveBack(error);
      return;
    }
    const model = this.model();
    const answer = new Answer(model);
    answer.onDraw = () => this.follow();
    this.thread.append(answer.element);
    this.follow(true);
    const aborter = new AbortController();
    this.setBusy(aborter);
    let problem = null;
    try {
      await answer.run(own, this.path, { model, ...body, ...this.asked() }, aborter.signal);
    } catch (error) {
      problem = error;
    }
    if (this.aborter !== aborter) return; // a new chat has begun, of which this answer is no part
    this.setBusy(null);
    if (problem && answer.isEmpty) {
      this.giveBack(problem);
      return;
    }
    this.messages.push(answer.message);
    this.save();
    this.drawActions(answer);
    this.follow();
    if (problem) this.onError(problem);
    else announce(`Answer finished: ${answer.facts.textContent}`);
  }

  /** What would be asked next, as a command; a key is named by its variable, and never written out. */
  curl() {
    const next = { role: "user", content: this.prompt.value || "Hello" };
    const asked = { model: this.model(), ...this.settings.body({ isChat: this.canChat }), ...this.asked([...this.messages, next]) };
    const key = own.getKey() ? ' -H "Authorization: Bearer $OCTAVO_API_KEY"' : "";
    const body = JSON.stringify(asked).replaceAll("'", "'\\''");
    return `curl ${own.base}${this.path}${key} -H 'Content-Type: application/json' -d '${body}'`;
  }

  get path() {
    return this.canChat ? "v1/chat/completions" : "v1/completions";
  }

  asked(messages = this.messages) {
    if (!this.canChat) return { prompt: messages.at(-1).content };
    const said = messages.map(({ by, isJson, reasoning, facts, ...message }) => message);
    return { messages: [...this.settings.systemMessages, ...said] };
  }

  /** Say what went wrong, and let what was typed be sent again. */
  giveBack(error) {
    if (this.messages.at(-1)?.role === "user") {
      this.write([this.messages.pop().content, this.prompt.value].filter(Boolean).join("\n"));
    }
    while (this.messages.at(-1)?.role === "tool") this.messages.pop(); // the fields for them are shown again
    this.save();
    this.draw();
    this.onError(error);
  }

  setBusy(aborter) {
    this.aborter = aborter;
    byId("send").hidden = Boolean(aborter);
    byId("stop").hidden = !aborter;
    if (aborter) announce("Asked");
  }

  /** Keep the end in sight, unless somebody reads further up. */
  follow(always = false) {
    const gap = this.thread.scrollHeight - this.thread.scrollTop - this.thread.clientHeight;
    if (always || gap < 160) this.thread.scrollTop = this.thread.scrollHeight;
  }

  draw() {
    this.welcome.hidden = this.messages.length > 0;
    const shown = this.messages.map((message, at) => this.drawn(message, at));
    this.thread.replaceChildren(this.welcome, ...shown.map((one) => one.element ?? one));
    const last = shown.at(-1);
    if (last instanceof Answer) this.drawActions(last);
    this.follow(true);
  }

  drawn(message, at) {
    if (message.role === "assistant") {
      const answer = new Answer(message.by ?? "the model");
      answer.restore(message);
      return answer;
    }
    if (message.role === "tool") {
      return el("article", { class: "message tool", "aria-label": "Result of a call" },
        el("p", { class: "who" }, "Result"), el("pre", { tabindex: 0 }, message.content));
    }
    const edit = el("button", { type: "button", class: "quiet small", onclick: () => this.edit(at) }, "Edit");
    return el("article", { class: "message user", "aria-label": "You" },
      el("div", { class: "bubble" }, message.content), el("footer", {}, edit));
  }

  edit(at) {
    if (this.aborter) return;
    const { content } = this.messages[at];
    this.messages = this.messages.slice(0, at);
    this.save();
    this.draw();
    this.write(content);
  }

  /** Below the last answer: copy, try again, and fields for what its calls return. */
  drawActions(answer) {
    for (const old of this.thread.querySelectorAll(".actions")) old.replaceChildren();
    if (!answer.element.isConnected) return;
    answer.actions.append(
      el("button", { type: "button", class: "quiet small", onclick: () => copy(answer.content) }, "Copy"),
      el("button", { type: "button", class: "quiet small", onclick: () => this.again() }, "Try again"),
    );
    const calls = answer.calls.filter(Boolean);
    if (calls.length && !answer.results) {
      answer.results = this.resultForm(calls);
      answer.callPlace.after(answer.results);
    }
  }

  again() {
    if (this.aborter) return;
    while (this.messages.length && this.messages.at(-1).role !== "user") this.messages.pop();
    this.draw();
    this.answer();
  }

  resultForm(calls) {
    const fields = calls.map((call) => el("textarea", { rows: 2, class: "code", placeholder: '{"result": 1}' }));
    const send = (event) => {
      event.preventDefault();
      if (this.aborter) return;
      calls.forEach((call, at) => this.messages.push({ role: "tool", tool_call_id: call.id, content: fields[at].value }));
      this.draw();
      this.answer();
    };
    const labels = calls.map((call, at) => el("label", { class: "field" }, `${call.function.name} returns`, fields[at]));
    return el("form", { class: "results", onsubmit: send }, ...labels, el("button", { type: "submit", class: "primary" }, "Send results"));
  }
}
