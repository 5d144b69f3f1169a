// A chart over time: uPlot's, with a legend in HTML that says the values at the cursor, else the latest.
/* global uPlot */
import { colorOf, el } from "./dom.js";

const HEIGHT = 170; // as .plot has it in views.css

const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hour12: false });

export class Chart {
  /** series: [{label, color (a variable of style.css)}]; format: of a value. */
  constructor(title, series, format) {
    this.series = series;
    this.format = format;
    this.data = [[], ...series.map(() => [])];
    this.plot = null;
    this.seconds = 60;
    this.place = el("div", { class: "plot", role: "img", "aria-label": `${title} over time; the latest values are listed above` });
    this.values = series.map(() => el("b", {}, "–"));
    const items = series.map((one, at) => {
      const swatch = el("span", { class: "line-swatch" });
      swatch.style.background = `var(${one.color})`;
      return el("li", {}, swatch, one.label, " ", this.values[at]);
    });
    this.element = el("figure", { class: "card chart" }, el("figcaption", {}, title), el("ul", { class: "chart-legend" }, ...items), this.place);
    new ResizeObserver(() => this.fit()).observe(this.place);
  }

  /** times: seconds since the epoch; columns: one array for each series; seconds: how far the chart reaches back. */
  set(times, columns, seconds) {
    this.seconds = seconds;
    this.data = [times, ...columns];
    if (this.plot) this.plot.setData(this.data);
    else this.make();
    this.tell(null);
  }

  make() {
    this.plot?.destroy();
    this.plot = null;
    const width = this.place.clientWidth;
    if (!width) return; // not shown
    const ink = colorOf("--soft");
    const grid = { stroke: colorOf("--line"), width: 1 };
    const axis = { stroke: ink, grid, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    this.plot = new uPlot({
      width,
      height: HEIGHT,
      padding: [8, 28, 0, 0],
      legend: { show: false },
      cursor: { y: false, sync: { key: "octavo" }, drag: { x: false, y: false } },
      scales: { x: { range: (_, low, high) => this.times(high ?? Date.now() / 1000) }, y: { range: (_, low, high) => [Math.min(0, low ?? 0), high > 0 ? high * 1.1 : 1] } },
      axes: [
        { ...axis, size: 26, space: 76, values: (_, at) => at.map(clock) },
        { ...axis, size: 58, values: (_, at) => at.map(this.format) },
      ],
      series: [{}, ...this.series.map((one) => ({ stroke: colorOf(one.color), width: 2, points: { show: false }, spanGaps: false }))],
      hooks: { setCursor: [(plot) => this.tell(plot.cursor.idx)] },
    }, this.data, this.place);
  }

  times(last) {
    return [last - this.seconds, last];
  }

  fit() {
    const width = this.place.clientWidth;
    if (this.plot && width) this.plot.setSize({ width, height: HEIGHT });
    else if (!this.plot) this.make();
  }

  tell(index) {
    const at = index ?? this.data[0].length - 1;
    this.values.forEach((place, series) => {
      const value = this.data[series + 1][at];
      place.textContent = value === null || value === undefined ? "–" : this.format(value);
    });
  }
}
