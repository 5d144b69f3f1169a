// The server's /metrics as figures: sums over engines, rates and percentiles between two moments.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** The samples of a page of Prometheus text. */
function* samplesOf(text) {
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (match) {
      const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
      yield { name: match[1], labels, value: match[3] === "+Inf" ? Infinity : Number(match[3]) };
    }
  }
}

export class Snapshot {
  constructor(text, seconds) {
    this.seconds = seconds;
    this.sums = new Map();
    this.counts = new Map();
    this.buckets = new Map();
    this.caches = [];
    for (const { name, labels, value } of samplesOf(text)) this.take(name, labels, value);
  }

  take(name, labels, value) {
    if (name === "vllm:cache_config_info") this.caches.push(labels);
    if (name.endsWith("_bucket")) {
      const histogram = name.slice(0, -"_bucket".length);
      if (!this.buckets.has(histogram)) this.buckets.set(histogram, new Map());
      const buckets = this.buckets.get(histogram);
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      buckets.set(bound, (buckets.get(bound) ?? 0) + value);
    } else {
      this.sums.set(name, (this.sums.get(name) ?? 0) + value);
      this.counts.set(name, (this.counts.get(name) ?? 0) + 1);
    }
  }

  sum(name) {
    return this.sums.get(name) ?? 0;
  }

  /** Whether counters began anew: what they count can't be told from what they counted before. */
  hasRestartedSince(before) {
    return [...before.sums].some(([name, value]) => /^vllm:\w+_(total|count)$/.test(name) && this.sum(name) < value);
  }

  /** Of a gauge that each engine has: the mean. */
  mean(name) {
    return this.sum(name) / (this.counts.get(name) ?? 1);
  }
}

/** How much a counter has grown; one that fell has begun anew. */
export function growth(before, now, name) {
  return Math.max(0, now.sum(name) - before.sum(name));
}

export function rate(before, now, name) {
  const seconds = now.seconds - before.seconds;
  return seconds > 0 ? growth(before, now, name) / seconds : 0;
}

/** Quantiles of what a histogram saw between two moments, as Prometheus' histogram_quantile estimates them: linear
 * within a bucket. Null where it saw nothing; behind the last bound, that bound. */
export function quantiles(before, now, name, wanted) {
  const bounds = [...(now.buckets.get(name) ?? new Map()).keys()].sort((a, b) => a - b);
  const counts = bounds.map((bound) => Math.max(0, now.buckets.get(name).get(bound) - (before.buckets.get(name)?.get(bound) ?? 0)));
  const total = counts.at(-1) ?? 0;
  if (!total) return wanted.map(() => null);
  return wanted.map((quantile) => {
    const at = counts.findIndex((count) => count >= quantile * total);
    const low = at ? bounds[at - 1] : 0;
    if (bounds[at] === Infinity) return low;
    const under = at ? counts[at - 1] : 0;
    return low + ((bounds[at] - low) * (quantile * total - under)) / (counts[at] - under);
  });
}
