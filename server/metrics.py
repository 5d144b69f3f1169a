"""/metrics: Prometheus, under vLLM's names and with vLLM's buckets, since dashboards and autoscalers key on them.

Times are the server's: what a client sees, less the network. `generate` (server/generation.py) reports how a request
ended, since it alone knows. What the engines' gauges are, the fleet is asked (fleet/collector.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from octavo.runtime.messages import EngineStats, Ready, StepOutputs, TokenOutput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
HTTP_SECONDS = (0.1, 0.5, 1)
LABELS = ("model_name", "engine")
HTTP_LABELS = ("handler", "method", "status")
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")

HISTOGRAMS = {
    "time_to_first_token_seconds": ("from arrival to the first token", FIRST_TOKEN),
    "inter_token_latency_seconds": ("between one token and the next", BETWEEN_TOKENS),
    "request_time_per_output_token_seconds": ("mean time of a token after the first, per request", BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("from arrival to the last token", WHOLE_REQUEST),
    "request_queue_time_seconds": ("from arrival to the first step", WHOLE_REQUEST),
    "request_prefill_time_seconds": ("from the first step to the first token", WHOLE_REQUEST),
    "request_decode_time_seconds": ("from the first token to the last", WHOLE_REQUEST),
    "request_inference_time_seconds": ("from the first step to the last token", WHOLE_REQUEST),
    "request_params_n": ("answers asked for", CHOICES),
    "request_num_preemptions": ("how often an answer's sequence gave up its blocks", PREEMPTIONS),
    "iteration_tokens_total": ("tokens of one step", STEP_TOKENS),
}
TOKEN_HISTOGRAMS = {  # with buckets up to the longest sequence
    "request_prompt_tokens": "prompt tokens of an answer",
    "request_prefill_kv_computed_tokens": "prompt tokens of an answer that were computed, and not cached",
    "request_generation_tokens": "generated tokens of an answer",
    "request_params_max_tokens": "max_tokens of a request",
    "request_max_num_generation_tokens": "generated tokens of the longest of a request's answers",
}
COUNTERS = {
    "prompt_tokens": "prompt tokens processed, cached ones among them",
    "prompt_tokens_cached": "prompt tokens that were in the prefix cache",
    "generation_tokens": "tokens generated",
    "num_preemptions": "sequences that gave up their blocks, to be computed again",
    "prefix_cache_queries": "prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "prompt tokens found there",
    "external_prefix_cache_queries": "prompt tokens looked up in the file of --kv-offloading-path",
    "external_prefix_cache_hits": "prompt tokens that were read from there",
    "kv_offload_load_bytes": "bytes of blocks that were read from there",
    "kv_offload_load_time": "seconds that this took",
    "kv_offload_store_bytes": "bytes of blocks that were written there",
    "kv_offload_store_time": "seconds that this took",
    "kv_offload_stores_skipped": "blocks that were not written there, since others were being written",
    "spec_decode_num_drafts": "sequences of steps that checked drafts",
    "spec_decode_num_draft_tokens": "drafts that were checked",
    "spec_decode_num_accepted_tokens": "drafts that were right",
}
TOTALS = {  # counters by the field of EngineStats that has the engine's total
    "num_preemptions": "num_preemptions",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "num_drafts": "spec_decode_num_drafts",
    "num_draft_tokens": "spec_decode_num_draft_tokens",
}
OFFLOAD_TOTALS = {  # the same of OffloadStats
    "num_queries": "external_prefix_cache_queries",
    "num_hits": "external_prefix_cache_hits",
    "load_bytes": "kv_offload_load_bytes",
    "load_seconds": "kv_offload_load_time",
    "store_bytes": "kv_offload_store_bytes",
    "store_seconds": "kv_offload_store_time",
    "num_skipped": "kv_offload_stores_skipped",
}
MOST_NOTED = 512  # tokens, or steps, of an engine that are counted together
MOST_ROUTES = 1024  # whose series are remembered; a client may make up methods
OUTCOMES = ("stop", "length", "repetition", "abort", "error")


@dataclass(slots=True)
class Timeline:
    """When things happened to one of an engine's requests, in seconds since the epoch; 0 where nothing has yet.

    engine: the number of the one that has it now.
    """

    arrival: float
    num_prompt: int
    num_cached: int = 0
    num_preemptions: int = 0
    scheduled: float = 0.0
    first: float = 0.0
    last: float = 0.0
    engine: int = 0


class _EngineSeries:
    """What is counted of one engine: the children of all metrics that have its number as a label."""

    def __init__(self, families: _Families, model_name: str, engine: int) -> None:
        labels = {"model_name": model_name, "engine": str(engine)}
        self.histograms = {name: metric.labels(**labels) for name, metric in families.histograms.items()}
        self.counters = {name: metric.labels(**labels) for name, metric in families.counters.items()}
        self.finished = _children(families.finished, labels, "finished_reason", OUTCOMES)
        self.by_source = _children(families.by_source, labels, "source", SOURCES)
        self.unparsed = families.unparsed.labels(**labels)
        self.damaged = families.damaged.labels(**labels)
        self.by_position = families.by_position
        self._labels = labels
        self.totals: EngineStats | None = None
        # Noted for each token or step, and counted together: prometheus_client's code would be a good part of what a
        # token costs, above all where there are few of them and the CPU's caches are cold.
        self.gaps: list[float] = []
        self.step_sizes: list[int] = []
        self.num_generated = 0

    def settle(self) -> None:
        """Count what has been noted."""
        for name, noted in (("inter_token_latency_seconds", self.gaps), ("iteration_tokens_total", self.step_sizes)):
            observe = self.histograms[name].observe
            for value in noted:
                observe(value)
        self.gaps.clear()
        self.step_sizes.clear()
        self.counters["generation_tokens"].inc(self.num_generated)
        self.num_generated = 0

    def step(self, stats: EngineStats) -> None:
        """Take the engine's own figures."""
        before = self.totals
        self._grow(TOTALS, stats, before)
        if stats.offload is not None:
            offload = before.offload if before is not None else None
            self._grow(OFFLOAD_TOTALS, stats.offload, offload)
            self.damaged.inc(stats.offload.num_damaged - (offload.num_damaged if offload is not None else 0))
        if stats.accepted_per_pos:
            self._accepted(stats.accepted_per_pos, before.accepted_per_pos if before is not None else [])
        if stats.step_tokens:
            self.step_sizes.append(stats.step_tokens)
            if len(self.step_sizes) >= MOST_NOTED:
                self.settle()
        self.totals = stats

    def _grow(self, names: Mapping[str, str], totals: object, before: object | None) -> None:
        for field, name in names.items():
            new = getattr(totals, field) - (getattr(before, field) if before is not None else 0)
            if new:
                self.counters[name].inc(new)

    def _accepted(self, totals: Sequence[int], before: Sequence[int]) -> None:
        for position, (total, earlier) in enumerate(zip_longest(totals, before, fillvalue=0)):
            if total > earlier:
                self.counters["spec_decode_num_accepted_tokens"].inc(total - earlier)
                self.by_position.labels(**self._labels, position=str(position)).inc(total - earlier)


def _children(metric: Counter, labels: Mapping[str, str], label: str, values: Iterable[str]) -> dict[str, Counter]:
    """A metric with one more label: its children by the label's values."""
    return {value: metric.labels(**labels, **{label: value}) for value in values}


class _Families:
    """The metrics that have one series, or one with each of some further labels, for each engine."""

    def __init__(self, registry: CollectorRegistry, longest: int) -> None:
        tokens = _token_buckets(longest)
        described = HISTOGRAMS | {name: (text, tokens) for name, text in TOKEN_HISTOGRAMS.items()}
        self.histograms = {
            name: Histogram(f"vllm:{name}", text, LABELS, registry=registry, buckets=buckets)
            for name, (text, buckets) in described.items()
        }
        self.counters = {
            name: Counter(f"vllm:{name}", text, LABELS, registry=registry) for name, text in COUNTERS.items()
        }
        self.finished = Counter(
            "vllm:request_success", "requests by how they ended", (*LABELS, "finished_reason"), registry=registry
        )
        self.by_source = Counter(
            "vllm:prompt_tokens_by_source", "computed or cached", (*LABELS, "source"), registry=registry
        )
        self.by_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "drafts that were right, by their place among those of a sequence and step",
            (*LABELS, "position"),
            registry=registry,
        )
        self.damaged = Counter(
            "octavo:kv_offload_damaged_blocks",
            "blocks in the file that were not what was written",
            LABELS,
            registry=registry,
        )
        self.unparsed = Counter(
            "octavo:tool_call_unparsed", "tool calls that could not be read", LABELS, registry=registry
        )


class Metrics:
    """All metrics of one server, labelled with the model's name and the number of the engine that they are about.

    cache_configs: for each engine what is told of its KV cache. shared_in: the directory in which several processes
    keep what they count (prometheus_client's multiprocess mode), so that each one's page has the sums; None: there is
    one process.
    """

    def __init__(
        self,
        model_name: str,
        ready: Ready,
        cache_configs: Sequence[dict[str, str]],
        shared_in: Path | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._page = self._registry
        if shared_in is None:
            ProcessCollector(registry=self._registry)
        else:
            self._page = CollectorRegistry()
            MultiProcessCollector(self._page, str(shared_in))  # type: ignore[no-untyped-call]
        families = _Families(self._registry, ready.max_model_len)
        self._engines = [_EngineSeries(families, model_name, engine) for engine in range(len(cache_configs))]
        self._labels = {"model_name": model_name, "engine": "0"}
        self._http = Counter("http_requests", "by route and status", HTTP_LABELS, registry=self._registry)
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "from a request's head to the end of its response",
            HTTP_LABELS[:2],
            registry=self._registry,
            buckets=HTTP_SECONDS,
        )
        info = Gauge(
            "vllm:cache_config_info",
            "the KV cache",
            ("engine", *cache_configs[0]),
            registry=self._registry,
            multiprocess_mode="max",
        )
        self._of_route = lru_cache(MOST_ROUTES)(self._series_of)  # prometheus_client takes longer to find them
        for engine, config in enumerate(cache_configs):
            info.labels(engine=str(engine), **config).set(1)
        self._hints = Counter(
            "octavo:ignored_hint",
            "requests with a field that changes nothing",
            (*LABELS, "field"),
            registry=self._registry,
        )

    @property
    def registry(self) -> CollectorRegistry:
        """Of what is counted here."""
        return self._registry

    def register(self, collector: Collector) -> None:
        """Let the page have what this one collects when it is asked for."""
        self._page.register(collector)

    def unregister(self, collector: Collector) -> None:
        """Let the page do without it."""
        self._page.unregister(collector)

    def hints(self, names: Iterable[str]) -> None:
        """A request set these fields, which change nothing."""
        for name in names:
            self._hints.labels(**self._labels, field=name).inc()

    def request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request has ended; the handler is its route, with placeholders."""
        count, durations = self._of_route(handler, method, status // 100)
        count.inc()
        durations.observe(seconds)

    def _series_of(self, handler: str, method: str, hundreds: int) -> tuple[Counter, Histogram]:
        return self._http.labels(handler, method, f"{hundreds}xx"), self._http_seconds.labels(handler, method)

    def unparsed_calls(self, count: int, engine: int = 0) -> None:
        """An engine's answer has so many tool calls that could not be read, and are its content."""
        if count:
            self._engines[engine].unparsed.inc(count)

    def settle(self) -> None:
        """Count what has been noted, so that other processes' pages have it."""
        for series in self._engines:
            series.settle()

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        self.settle()
        return generate_latest(self._page)

    def step(self, engine: int, step: StepOutputs) -> None:
        """Take an engine's own figures; called for each of its steps."""
        self._engines[engine].step(step.stats)

    def restart(self, engine: int) -> None:
        """An engine has been started anew: its totals begin with 0."""
        self._engines[engine].totals = None

    def tokens(self, timeline: Timeline, output: TokenOutput, num_tokens: int) -> None:
        """One output of a request, now; of its tokens `num_tokens` are part of the answer."""
        now = time.time()
        series = self._engines[timeline.engine]
        if timeline.first:
            series.gaps.append(now - timeline.last)
            if len(series.gaps) >= MOST_NOTED:
                series.settle()
        else:
            histograms = series.histograms
            timeline.first = now
            timeline.scheduled = output.scheduled_time or now
            histograms["time_to_first_token_seconds"].observe(now - timeline.arrival)
            histograms["request_queue_time_seconds"].observe(timeline.scheduled - timeline.arrival)
            histograms["request_prefill_time_seconds"].observe((output.first_token_time or now) - timeline.scheduled)
            _count_prompt(series, timeline, output.num_cached_tokens or 0, output.num_fetched_tokens)
        timeline.num_preemptions = output.num_preemptions
        timeline.last = now
        series.num_generated += num_tokens

    def end(self, timeline: Timeline, outcome: str, num_tokens: int) -> None:
        """An answer has ended, as `outcome` says."""
        series = self._engines[timeline.engine]
        series.finished[outcome].inc()
        if not timeline.first:
            return
        histograms = series.histograms
        histograms["e2e_request_latency_seconds"].observe(timeline.last - timeline.arrival)
        histograms["request_decode_time_seconds"].observe(timeline.last - timeline.first)
        histograms["request_inference_time_seconds"].observe(timeline.last - timeline.scheduled)
        histograms["request_prompt_tokens"].observe(timeline.num_prompt)
        histograms["request_generation_tokens"].observe(num_tokens)
        histograms["request_num_preemptions"].observe(timeline.num_preemptions)
        histograms["request_prefill_kv_computed_tokens"].observe(timeline.num_prompt - timeline.num_cached)
        if num_tokens > 1:
            each = (timeline.last - timeline.first) / (num_tokens - 1)
            histograms["request_time_per_output_token_seconds"].observe(each)

    def end_all(self, timeline: Timeline, num_choices: int, max_tokens: int, longest: int) -> None:
        """All answers to one prompt have ended; `longest` is the number of tokens of the longest.

        timeline: of the first of them.
        """
        histograms = self._engines[timeline.engine].histograms
        histograms["request_params_n"].observe(num_choices)
        histograms["request_params_max_tokens"].observe(max_tokens)
        histograms["request_max_num_generation_tokens"].observe(longest)


def _count_prompt(series: _EngineSeries, timeline: Timeline, num_cached: int, num_fetched: int) -> None:
    timeline.num_cached = num_cached
    series.counters["prompt_tokens"].inc(timeline.num_prompt)
    series.counters["prompt_tokens_cached"].inc(num_cached)
    series.by_source["local_cache_hit"].inc(num_cached - num_fetched)
    series.by_source["external_kv_transfer"].inc(num_fetched)
    series.by_source["local_compute"].inc(timeline.num_prompt - num_cached)


def _token_buckets(longest: int) -> list[int]:
    """1, 2, 5, 10, 20, ... up to the longest sequence."""
    steps = [digit * 10**exponent for exponent in range(10) for digit in (1, 2, 5)]
    return [step for step in steps if step <= longest] or [longest]
