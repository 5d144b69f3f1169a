// Elements from values. Text is only ever text: nothing on this page parses HTML.

/** An element. `on...` are listeners, `data` is its dataset, `class` and the rest attributes; true is an empty one. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Say something to screen readers alone. */
export function announce(text) {
  byId("status").textContent = text;
}

/** Put a text into an element that is shown while it has one. */
export function showText(place, text) {
  place.textContent = text;
  place.hidden = !text;
}

/** A line above everything; an empty text takes it away. */
export function notice(text) {
  showText(byId("notice"), text);
}

/** Put a text on the clipboard, and say so. Browsers have one for scripts on https and localhost alone, and may forbid
 * it; the older way works everywhere. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    if (!isCopied) {
      notice("The browser does not let this page copy.");
      return;
    }
  }
  announce("Copied");
}

/** A definition list of [name, value] pairs. */
export function fillFacts(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

/** The color that a variable of style.css has now, as a canvas takes it. */
export function colorOf(variable) {
  const probe = el("span", { hidden: true });
  probe.style.color = `var(${variable})`;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

const unkept = new Map(); // what the browser's storage did not take, being full or forbidden: the page alone knows it

/** A value kept for this tab, or in "localStorage" for this browser. A key never goes to the latter. */
export function kept(name, fallback, storage = "sessionStorage") {
  try {
    return unkept.get(name) ?? JSON.parse(window[storage].getItem(`octavo.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function keep(name, value, storage = "sessionStorage") {
  try {
    window[storage].setItem(`octavo.${name}`, JSON.stringify(value)); // to name a forbidden storage is an error already
    unkept.delete(name);
  } catch {
    unkept.set(name, value);
  }
}
