// Markdown as elements, built one by one: what a model writes is never parsed as HTML, and its links are http alone.
import { copy, el } from "./dom.js";

// Bounded, since a model may repeat an opening mark forever, and each would look for its end in all that follows.
const INLINE =
  /(`+)([^`]|[^`][\s\S]{0,999}?[^`])\1(?!`)|\*\*(\S(?:[\s\S]{0,999}?\S)?)\*\*|(?<![\w*])[*_](\S(?:[^*_]{0,999}\S)?)[*_](?![\w*])|~~(\S(?:[\s\S]{0,999}?\S)?)~~|\[([^\]\n]{1,999})\]\((https?:\/\/[^\s)]{1,1999})\)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DEEPEST = 12;
const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const ROW = /^\s*\|.*\|\s*$/;
const ROW_LINE = /^\s*\|(\s*:?-+:?\s*\|)+\s*$/;

/** The nodes of a text. */
export function markdown(text) {
  return blocks(text.split(/\r\n|[\n\r\u2028\u2029]/), 0);
}

/** depth: how many quotes and lists are around these lines. A model may nest without end, and a browser can't. */
function blocks(lines, depth) {
  const found = [];
  let at = 0;
  const takeWhile = (is) => {
    const from = at;
    while (at < lines.length && is(lines[at])) at += 1;
    return lines.slice(from, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (!line.trim()) at += 1;
    else if (fence) {
      at += 1;
      const body = takeWhile((next) => !next.trim().startsWith(fence[1]));
      at += 1;
      found.push(codeBlock(body.join("\n"), fence[2]));
    } else if (heading) {
      at += 1;
      found.push(el(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])));
    } else if (RULE.test(line)) {
      at += 1;
      found.push(el("hr"));
    } else if (depth < DEEPEST && /^\s*>/.test(line)) {
      const quoted = takeWhile((next) => /^\s*>/.test(next)).map((next) => next.replace(/^\s*>\s?/, ""));
      found.push(el("blockquote", {}, ...blocks(quoted, depth + 1)));
    } else if (depth < DEEPEST && ITEM.test(line)) {
      const indent = ITEM.exec(line)[1].length;
      found.push(list(takeWhile((next) => ITEM.test(next) || (next.trim() && next.search(/\S/) > indent)), depth + 1));
    } else if (ROW.test(line) && ROW_LINE.test(lines[at + 1] ?? "")) {
      found.push(table(takeWhile((next) => ROW.test(next))));
    } else {
      at += 1; // whatever it is: or this would never end
      found.push(el("p", {}, ...inline([line, ...takeWhile(isPlain)].join("\n"))));
    }
  }
  return found;
}

/** Whether a line goes on with the paragraph above it. */
function isPlain(line) {
  return line.trim() && !FENCE.test(line) && !ITEM.test(line) && !/^(#{1,6}\s|\s*>)/.test(line);
}

function codeBlock(text, language) {
  const button = el("button", { type: "button", class: "copy", onclick: () => copy(text) }, "Copy");
  const head = el("div", { class: "code-head" }, el("span", {}, language), button);
  return el("div", { class: "code-block" }, head, el("pre", { tabindex: 0 }, el("code", {}, text)));
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length) items.push([item[3]]);
    else items.at(-1).push(line.slice(Math.min(line.search(/\S/), indent.length + 2)));
  }
  const made = items.map(([first, ...rest]) => el("li", {}, ...inline(first), ...blocks(rest, depth)));
  const number = Number.parseInt(mark, 10);
  return Number.isNaN(number) ? el("ul", {}, ...made) : el("ol", { start: number }, ...made);
}

function table([head, , ...rows]) {
  const cells = (row) => row.trim().slice(1, -1).split("|").map((cell) => cell.trim());
  const made = (row, name) => el("tr", {}, ...cells(row).map((cell) => el(name, {}, ...inline(cell))));
  const body = el("tbody", {}, ...rows.map((row) => made(row, "td")));
  return el("div", { class: "scroll", tabindex: 0 }, el("table", {}, el("thead", {}, made(head, "th")), body));
}

function inline(text) {
  const nodes = [];
  let rest = text;
  for (let match = INLINE.exec(rest); match; match = INLINE.exec(rest)) {
    if (match.index) nodes.push(rest.slice(0, match.index));
    const [whole, , code, bold, italic, struck, label, href] = match;
    if (code !== undefined) nodes.push(el("code", {}, code.trim()));
    else if (bold !== undefined) nodes.push(el("strong", {}, ...inline(bold)));
    else if (italic !== undefined) nodes.push(el("em", {}, ...inline(italic)));
    else if (struck !== undefined) nodes.push(el("del", {}, ...inline(struck)));
    else nodes.push(el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, label));
    rest = rest.slice(match.index + whole.length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}
