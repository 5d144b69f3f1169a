// One prompt to two models, of this server or of others, side by side.
import { Answer } from "./answer.js";
import { announce, byId, el, keep, kept, showText } from "./dom.js";
import { own, serverAt } from "./server.js";
import { offerModels } from "./settings.js";

class Side {
  constructor(name, number, onError) {
    this.name = name;
    this.number = number;
    this.onError = onError;
    const was = kept(`side.${number}`, {});
    this.url = el("input", { type: "text", inputmode: "url", placeholder: "this server", spellcheck: "false", value: was.url ?? "" });
    this.key = el("input", { type: "password", autocomplete: "off", placeholder: "none", value: was.key ?? "" });
    this.model = el("select", {});
    this.place = el("div", { class: "side-answer" });
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.keyField = el("label", { class: "field" }, "Its API key", this.key);
    this.element = el("section", { class: "side card", "aria-label": `Side ${name}` },
      el("h2", {}, name),
      el("label", { class: "field" }, "Server", this.url), this.keyField,
      el("label", { class: "field" }, "Model", this.model), this.error, this.place);
    this.url.addEventListener("change", () => {
      this.key.value = ""; // it was for another server
      this.connect();
    });
    this.key.addEventListener("change", () => this.connect());
    this.showKey();
  }

  get server() {
    return this.url.value.trim() ? serverAt(this.url.value, () => this.key.value.trim()) : own;
  }

  showKey() {
    this.keyField.hidden = !this.url.value.trim();
  }

  async connect() {
    this.showKey();
    keep(`side.${this.number}`, { url: this.url.value, key: this.key.value });
    this.complain("");
    const [url, key] = [this.url.value, this.key.value];
    let names = [];
    let problem = null;
    try {
      names = await this.server.modelNames();
    } catch (error) {
      problem = error;
    }
    if (this.url.value !== url || this.key.value !== key) return; // somebody types on: the next answer counts
    offerModels(this.model, names);
    if (!problem) return;
    this.complain(problem.message);
    if (!url.trim()) this.onError(problem);
  }

  complain(message) {
    showText(this.error, message);
  }

  /** The answer, once it is whole; null where there is none. */
  async run(body, signal) {
    this.complain("");
    const answer = new Answer(this.model.value || this.name);
    this.place.replaceChildren(answer.element);
    try {
      await answer.run(this.server, "v1/chat/completions", { model: this.model.value, ...body }, signal);
      return answer;
    } catch (error) {
      if (answer.isEmpty) answer.element.remove();
      this.complain(error.message);
      return null;
    }
  }
}

export class Compare {
  constructor(settings, onError) {
    this.settings = settings;
    this.onError = onError;
    this.sides = ["A", "B"].map((name, number) => new Side(name, number, onError));
    this.aborter = null;
    byId("sides").append(...this.sides.map((side) => side.element));
    byId("origin-hint").textContent = `octavo serve ... --allowed-origins '["${location.origin}"]'`;
    byId("compare-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    byId("compare-prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.run();
    });
    byId("compare-stop").addEventListener("click", () => this.aborter?.abort());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.aborter?.abort());
  }

  async connect() {
    await Promise.all(this.sides.map((side) => side.connect()));
  }

  async run() {
    const prompt = byId("compare-prompt").value;
    if (!prompt.trim() || this.aborter) return;
    let body;
    try {
      body = this.settings.body();
    } catch (error) {
      this.onError(error);
      return;
    }
    body.messages = [...this.settings.systemMessages, { role: "user", content: prompt }];
    showText(byId("compare-verdict"), "");
    const aborter = new AbortController();
    this.setBusy(aborter);
    try {
      const answers = await this.answers(body, aborter.signal);
      if (!aborter.signal.aborted) this.judge(answers);
    } finally {
      this.setBusy(null);
    }
  }

  async answers(body, signal) {
    if (byId("compare-order").value === "together") {
      return Promise.all(this.sides.map((side) => side.run(body, signal)));
    }
    const found = [];
    for (const side of this.sides) if (!signal.aborted) found.push(await side.run(body, signal));
    return found;
  }

  judge([a, b]) {
    if (!a || !b) return;
    const said = [agreement(a.content, b.content), pace(a.speed, b.speed)].filter(Boolean);
    showText(byId("compare-verdict"), said.join(" "));
  }

  setBusy(aborter) {
    this.aborter = aborter;
    byId("compare-run").hidden = Boolean(aborter);
    byId("compare-stop").hidden = !aborter;
    if (aborter) announce("Asked both");
  }
}

function agreement(a, b) {
  if (a === b) return "Both answers are the same.";
  let same = 0;
  while (same < a.length && a[same] === b[same]) same += 1;
  return same ? `The answers part after ${same} characters: “…${a.slice(Math.max(0, same - 24), same)}”.` : "The answers part at once.";
}

function pace(a, b) {
  if (!a.rate || !b.rate) return "";
  const [faster, slower, name] = a.rate > b.rate ? [a, b, "A"] : [b, a, "B"];
  return `${name} wrote ${(faster.rate / slower.rate).toFixed(2)} times as fast, this once: octavo bench measures it.`;
}
