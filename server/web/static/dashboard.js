// What the server does now, out of its /metrics, and what it is made of, out of /server_info.
import { Chart } from "./chart.js";
import { byId, el, fillFacts, keep, kept } from "./dom.js";
import { growth, quantiles, rate, Snapshot } from "./prometheus.js";
import { own } from "./server.js";

const EVERY = 2000; // milliseconds
const LEAST_SECONDS = 0.5; // between two snapshots: a rate over less is noise
const MOST_SECONDS = 300;
const QUANTILES = [0.5, 0.9, 0.99];
const FIRST = "vllm:time_to_first_token_seconds";
const EACH = "vllm:request_time_per_output_token_seconds";

const number = (value) => (value >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3))));
const share = (value) => `${Number((100 * value).toPrecision(value < 0.1 ? 2 : 3))} %`;
const duration = (seconds) => {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${number(1000 * seconds)} ms` : `${number(seconds)} s`;
};
const bytes = (count) => (count >= 1e9 ? `${(count / 1e9).toFixed(2)} GB` : `${(count / 1e6).toFixed(1)} MB`);
const dollars = (value) => `$${value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3)}`;

export class Dashboard {
  constructor(onError) {
    this.onError = onError;
    this.snapshots = [];
    this.points = [];
    this.isPaused = false;
    this.isAsking = false;
    this.timer = null;
    this.cost = byId("cost");
    this.cost.value = kept("cost", "", "localStorage");
    this.tiles = new Map();
    const percentiles = [
      { label: "p50", color: "--chart-1" }, { label: "p90", color: "--chart-2" }, { label: "p99", color: "--chart-3" },
    ];
    this.charts = {
      tokens: new Chart("Tokens a second", [{ label: "output", color: "--chart-1" }, { label: "prompt", color: "--chart-2" }], number),
      first: new Chart("Time to first token", percentiles, duration),
      each: new Chart("Time per output token", percentiles, duration),
      requests: new Chart("Requests", [{ label: "running", color: "--chart-1" }, { label: "waiting", color: "--chart-3" }], number),
      cache: new Chart("KV cache and prefix hits", [{ label: "in use", color: "--chart-1" }, { label: "hits", color: "--chart-2" }], share),
    };
    byId("charts").prepend(...Object.values(this.charts).map((chart) => chart.element));
    this.cost.addEventListener("input", () => {
      keep("cost", this.cost.value, "localStorage");
      this.drawCost();
    });
    byId("window").addEventListener("change", () => this.draw());
    byId("pause").addEventListener("click", () => this.pause(!this.isPaused));
    document.addEventListener("visibilitychange", () => this.run(this.isShown));
  }

  pause(isPaused) {
    this.isPaused = isPaused;
    byId("pause").textContent = isPaused ? "Go on" : "Pause";
    if (!isPaused) this.poll();
  }

  /** Ask for figures while the view is shown. */
  run(isShown) {
    this.isShown = isShown;
    clearInterval(this.timer);
    if (!isShown || document.hidden) return;
    this.timer = setInterval(() => this.poll(), EVERY);
    this.poll();
    this.drawServer();
  }

  recolor() {
    for (const chart of Object.values(this.charts)) chart.make();
  }

  async poll() {
    if (this.isPaused || this.isAsking) return;
    this.isAsking = true; // a slow server gets no second question before its answer
    try {
      const text = await (await own.ask("metrics")).text();
      this.take(new Snapshot(text, Date.now() / 1000));
      this.onError(null);
    } catch (error) {
      if (error.status === 401) clearInterval(this.timer); // until there is a key: who is asked for one may say no
      this.onError(error);
    } finally {
      this.isAsking = false;
    }
  }

  take(now) {
    const before = this.snapshots.at(-1);
    if (before && now.seconds - before.seconds < LEAST_SECONDS) return;
    if (before && now.hasRestartedSince(before)) {
      this.snapshots = [now];
      this.info = null; // another model, perhaps
      this.drawServer();
      return;
    }
    this.snapshots.push(now);
    while (now.seconds - this.snapshots[0].seconds > MOST_SECONDS + 4) this.snapshots.shift();
    if (before) this.points.push(this.point(before, now));
    while (this.points.length && now.seconds - this.points[0].seconds > MOST_SECONDS) this.points.shift();
    this.draw();
  }

  point(before, now) {
    const from = this.windowStart();
    const queries = growth(from, now, "vllm:prefix_cache_queries_total");
    return {
      seconds: now.seconds,
      output: rate(before, now, "vllm:generation_tokens_total"),
      prompt: rate(before, now, "vllm:prompt_tokens_total"),
      first: quantiles(from, now, FIRST, QUANTILES),
      each: quantiles(from, now, EACH, QUANTILES),
      running: now.sum("vllm:num_requests_running"),
      waiting: now.sum("vllm:num_requests_waiting"),
      cache: now.mean("vllm:kv_cache_usage_perc"),
      hits: queries ? growth(from, now, "vllm:prefix_cache_hits_total") / queries : null,
    };
  }

  /** The oldest snapshot within the window. */
  windowStart() {
    const end = this.snapshots.at(-1).seconds - Number(byId("window").value) - 1;
    return this.snapshots.find((one) => one.seconds >= end);
  }

  draw() {
    if (!this.snapshots.length) return;
    const times = this.points.map((point) => point.seconds);
    const column = (of) => this.points.map(of);
    const columns = {
      tokens: [column((p) => p.output), column((p) => p.prompt)],
      first: QUANTILES.map((_, at) => column((p) => p.first[at])),
      each: QUANTILES.map((_, at) => column((p) => p.each[at])),
      requests: [column((p) => p.running), column((p) => p.waiting)],
      cache: [column((p) => p.cache), column((p) => p.hits)],
    };
    for (const [name, chart] of Object.entries(this.charts)) chart.set(times, columns[name], Number(byId("window").value));
    this.drawTiles();
    this.drawCost();
    this.drawMemory();
  }

  drawTiles() {
    const now = this.snapshots.at(-1);
    const from = this.windowStart();
    const { first, each, hits } = this.point(from, now);
    const done = growth(from, now, "vllm:request_success_total");
    this.tile("Output tokens/s", number(rate(from, now, "vllm:generation_tokens_total")), `${done} answers finished`);
    this.tile("Prompt tokens/s", number(rate(from, now, "vllm:prompt_tokens_total")), hits === null ? "no prompt yet" : `${share(hits)} from the prefix cache`);
    this.tile("First token, p50", duration(first[0]), `p90 ${duration(first[1])}, p99 ${duration(first[2])}`);
    this.tile("Per output token, p50", duration(each[0]), `p90 ${duration(each[1])}, p99 ${duration(each[2])}`);
    this.tile("Running", number(now.sum("vllm:num_requests_running")), `${number(now.sum("vllm:num_requests_waiting"))} waiting`);
    const engines = now.counts.get("octavo:engine_up") ?? 1;
    this.tile("KV cache in use", share(now.mean("vllm:kv_cache_usage_perc")), `${now.sum("octavo:engine_up")} of ${engines} engine${engines > 1 ? "s" : ""} up`);
  }

  tile(name, value, more) {
    if (!this.tiles.has(name)) {
      const parts = [el("b", {}), el("small", {})];
      this.tiles.set(name, parts);
      byId("tiles").append(el("div", { class: "tile" }, el("span", {}, name), ...parts));
    }
    const [big, small] = this.tiles.get(name);
    big.textContent = value;
    small.textContent = more;
  }

  drawCost() {
    const hourly = Number(this.cost.value);
    if (!(hourly > 0) || !this.snapshots.length) {
      fillFacts(byId("cost-facts"), [["A million tokens", "type what an hour costs"]]);
      return;
    }
    const now = this.snapshots.at(-1);
    const from = this.windowStart();
    const output = rate(from, now, "vllm:generation_tokens_total");
    const prompt = rate(from, now, "vllm:prompt_tokens_total");
    const million = (tokens) => (tokens > 0 ? dollars((hourly * 1e6) / (3600 * tokens)) : "nothing runs");
    fillFacts(byId("cost-facts"), [
      ["A million output tokens", million(output)],
      ["A million tokens, prompt and output", million(output + prompt)],
      ["A day", dollars(24 * hourly)],
      ["Output of a day", `${number((86400 * output) / 1e6)} M tokens`],
    ]);
  }

  /** What doesn't change while the server runs. */
  async drawServer() {
    if (this.info) return;
    try {
      this.info = await own.json("server_info");
    } catch {
      return; // whoever polls says so
    }
    this.drawMemory();
    const { engine } = this.info;
    if (!engine) return;
    const head = el("tr", {}, ...["Layers", "Scheme", "Kernel"].map((name) => el("th", { scope: "col" }, name)));
    const rows = engine.layers.map((row) => el("tr", {}, el("th", { scope: "row" }, row.layers), el("td", {}, row.scheme), el("td", {}, row.body)));
    byId("kernels").replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
    byId("engine-notes").replaceChildren(...[...engine.ranks, ...engine.notes].map((note) => el("li", {}, note)));
  }

  drawMemory() {
    const now = this.snapshots.at(-1);
    const engine = this.info?.engine;
    if (!now || !engine) return;
    const tokens = now.caches.reduce((sum, cache) => sum + Number(cache.kv_cache_size_tokens), 0);
    const many = now.caches.length > 1 ? `, and so in each of ${now.caches.length} engines` : "";
    fillFacts(byId("memory"), [
      ["Weights", `${bytes(engine.weight_bytes)}${many}`],
      ["KV cache", `${bytes(engine.kv_cache_bytes)} in ${engine.kv_cache_dtype}${many}`],
      ["Tokens it holds", tokens.toLocaleString("en")],
      ["Model", `${engine.architecture}, ${engine.dtype}`],
      ["Device", engine.device],
      ["Loaded in", duration(Object.values(engine.seconds).reduce((sum, seconds) => sum + seconds, 0))],
      ["Longest context", `${this.info.max_model_len.toLocaleString("en")} tokens`],
    ]);
  }
}
