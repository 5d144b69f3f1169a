// An answer token by token, each colored by how sure the model was, with what else it might have said.
import { el } from "./dom.js";

const LEVELS = [0.9, 0.7, 0.4, 0.15]; // probabilities from which a token has the color of its place in this list

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(1)} %` : p >= 0.01 ? `${p.toPrecision(2)} %` : "under 0.01 %";
};

/** A token as it can be seen: blanks around it and line ends are written out. */
const shown = (text) =>
  text.replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length)).replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

/** A token as it can be heard. */
const spoken = (text) => text.trim() || (text.includes("\n") ? "line end" : text ? "blank" : "nothing");

export class TokenView {
  constructor() {
    this.tokens = [];
    this.panel = el("div", { class: "alternatives", role: "tooltip", hidden: true, id: `alternatives-${(TokenView.count += 1)}` });
    this.text = el("div", {
      class: "tokens", role: "group", "aria-label": "Tokens, colored by confidence; arrow keys go from one to the next",
    });
    this.element = el("div", { class: "token-view" }, legend(), this.text, this.panel);
    for (const name of ["focusin", "mouseover", "click"]) {
      this.text.addEventListener(name, (event) => this.show(event.target.closest(".token")));
    }
    this.text.addEventListener("mouseleave", () => this.hide());
    this.text.addEventListener("focusout", () => this.hide());
    this.text.addEventListener("keydown", (event) => this.move(event));
  }

  static count = 0;

  /** OpenAI's entries: token, logprob, top_logprobs. */
  add(entries) {
    for (const entry of entries) {
      const probability = Math.exp(entry.logprob);
      const level = LEVELS.findIndex((least) => probability >= least);
      this.text.append(
        el("span", {
          class: `token sure-${level < 0 ? LEVELS.length : level}`, role: "button",
          tabindex: this.tokens.length ? -1 : 0, data: { index: this.tokens.length },
          "aria-label": `${spoken(entry.token)}, ${percent(entry.logprob)}`,
        }, entry.token),
      );
      this.tokens.push(entry);
    }
  }

  show(token) {
    if (!token) return;
    const entry = this.tokens[Number(token.dataset.index)];
    const others = (entry.top_logprobs ?? []).filter((other) => other.token !== entry.token);
    const rows = [entry, ...others].sort((a, b) => b.logprob - a.logprob);
    this.panel.replaceChildren(
      el("table", {}, el("caption", {}, "What the model might have said here"),
        ...rows.map((row) => alternative(row, row === entry))),
    );
    this.panel.hidden = false;
    for (const other of this.text.querySelectorAll("[aria-describedby]")) other.removeAttribute("aria-describedby");
    token.setAttribute("aria-describedby", this.panel.id);
    place(this.panel, token);
  }

  hide() {
    if (!this.text.contains(document.activeElement)) this.panel.hidden = true;
  }

  move(event) {
    const spans = this.text.children;
    const at = Number(event.target.dataset.index);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape") this.panel.hidden = true;
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  }
}

function alternative(row, isChosen) {
  const bar = el("div", { class: "odds" });
  bar.style.width = `${100 * Math.exp(row.logprob)}%`;
  const name = el("th", { scope: "row" }, shown(row.token), isChosen ? el("span", { class: "hidden" }, " (chosen)") : null);
  return el("tr", { class: isChosen ? "chosen" : null }, name, el("td", {}, percent(row.logprob)), el("td", { class: "odds-place" }, bar));
}

/** Put the panel below a token, or above it where there is no room; it scrolls along. */
function place(panel, token) {
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const around = panel.parentElement.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = panel;
  const isBelow = box.bottom + 6 + height <= innerHeight || box.top < height + 70;
  panel.style.left = `${Math.max(0, Math.min(box.left - around.left, around.width - width))}px`;
  panel.style.top = `${(isBelow ? box.bottom + 6 : box.top - height - 6) - around.top}px`;
}

function legend() {
  const names = ["90 % and more", "70 %", "40 %", "15 %", "less"];
  const items = names.map((name, level) => el("li", {}, el("span", { class: `swatch sure-${level}` }), name));
  return el("ul", { class: "legend", "aria-label": "Colors: how probable a token was" }, ...items);
}
