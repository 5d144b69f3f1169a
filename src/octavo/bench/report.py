"""The report: vLLM's lines on the screen, which people parse, and vLLM's key names in the JSON file.

What octavo adds has lines and keys of its own: cached input, token goodput, steady throughput, dollars.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from octavo.bench.load import LoadResult, Record
from octavo.bench.metrics import Cost, Metrics, cost, measure
from octavo.bench.options import BenchError, BenchOptions

WIDTH = 50
MAX_REASONS = 5
NOTABLE_LAG = 0.01  # seconds
TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def evaluate(result: LoadResult, options: BenchOptions) -> tuple[Metrics, Cost | None]:
    """The figures that the options ask for, and the prices where they say what an hour costs."""
    metrics = measure(result, options.metric_percentiles, dict(options.goodput))
    return metrics, None if options.cost_per_hour is None else cost(metrics, options.cost_per_hour, options.num_gpus)


def report_lines(metrics: Metrics, options: BenchOptions, prices: Cost | None, num_unfinished: int) -> list[str]:
    """The text report."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines.append(_line("Successful requests:", metrics.completed))
    lines.append(_line("Failed requests:", metrics.failed))
    if num_unfinished:
        lines.append(_line("Unfinished requests (not counted):", num_unfinished))
    if options.max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", options.max_concurrency))
    if options.request_rate != float("inf"):
        lines.append(_line("Request rate configured (RPS):", options.request_rate))
    if options.ramp_up_strategy is not None:
        lines.append(_line("Ramp-up from (RPS):", options.ramp_up_start_rps or 0.0))
        lines.append(_line("Ramp-up to (RPS):", options.ramp_up_end_rps or 0.0))
    lines.append(_line("Benchmark duration (s):", metrics.duration))
    lines.append(_line("Total input tokens:", metrics.total_input))
    if metrics.cached_input is not None:
        lines.append(_line("Cached input tokens:", metrics.cached_input))
    lines.append(_line("Total generated tokens:", metrics.total_output))
    lines.append(_line("Request throughput (req/s):", metrics.request_throughput))
    if metrics.request_goodput is not None and metrics.output_goodput is not None:
        lines.append(_line("Request goodput (req/s):", metrics.request_goodput))
        lines.append(_line("Output token goodput (tok/s):", metrics.output_goodput))
    lines.append(_line("Output token throughput (tok/s):", metrics.output_throughput))
    if metrics.steady_output is not None:
        lines.append(_line("Steady output throughput (tok/s):", metrics.steady_output))
    lines.append(_line("Peak output token throughput (tok/s):", metrics.max_output_per_s))
    lines.append(_line("Peak concurrent requests:", float(metrics.max_concurrent)))
    lines.append(_line("Total token throughput (tok/s):", metrics.total_throughput))
    for name in options.percentile_metrics:
        lines += _latency_lines(metrics, name)
    if prices is not None:
        lines += _cost_lines(prices, options)
    lines.append("=" * WIDTH)
    return lines


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"


def _latency_lines(metrics: Metrics, name: str) -> list[str]:
    short, title = TITLES[name]
    found = metrics.latencies[name]
    return [
        f"{title:-^{WIDTH}}",
        _line(f"Mean {short} (ms):", found.mean),
        _line(f"Median {short} (ms):", found.median),
        *(_line(f"P{_percentile(p)} {short} (ms):", value) for p, value in found.percentiles.items()),
    ]


def _percentile(p: float) -> str:
    return str(int(p)) if p == int(p) else str(p)


def _cost_lines(prices: Cost, options: BenchOptions) -> list[str]:
    gpus = f" x {options.num_gpus} GPUs" if options.num_gpus > 1 else ""
    lines = [
        f"{f'Cost at ${options.cost_per_hour:g}/h{gpus}':-^{WIDTH}}",
        _dollars("$ per 1M output tokens:", prices.per_1m_output),
        _dollars("$ per 1M total tokens:", prices.per_1m_total),
    ]
    if options.goodput:
        lines.append(_dollars("$ per 1M output tokens within the SLO:", prices.per_1m_output_at_slo))
    return lines


def _dollars(label: str, value: float | None) -> str:
    return f"{label:<40} {'n/a' if value is None else f'{value:.4f}':<10}"


def notes(result: LoadResult) -> list[str]:
    """Notes on how the numbers were counted; none where the server counted."""
    good = [record for record in result.records if record.error is None]
    lines = []
    uncounted = sum(not record.counted_by_server for record in good)
    if uncounted:
        lines.append(
            f"note: {uncounted} of {len(good)} answers came without usage: their generated tokens are the events that "
            "carried some, and their input tokens are as asked for (0 where that isn't known)"
        )
    lags = sorted(record.lag for record in good)
    lag = lags[int(0.99 * (len(lags) - 1))] if lags else 0.0
    if lag > NOTABLE_LAG:
        lines.append(
            f"note: 1 % of the requests were sent {lag * 1e3:.0f} ms or more after the "
            "time that they were meant for, from which latencies count: they waited for a place under "
            "--max-concurrency, or this client was too slow"
        )
    if result.num_unfinished:
        lines.append(
            f"note: interrupted; {result.num_unfinished} requests were under way or not yet sent, and count nowhere"
        )
    return lines


def failure_lines(records: Sequence[Record]) -> list[str]:
    """The distinct reasons of failures, the most frequent first."""
    reasons = Counter(record.error for record in records if record.error is not None)
    lines = [f"{count} failed: {reason}" for reason, count in reasons.most_common(MAX_REASONS)]
    if len(reasons) > MAX_REASONS:
        more = len(reasons) - MAX_REASONS
        lines.append(f"... and for {more} more reason{'s' if more > 1 else ''}")
    return lines


def result_json(
    options: BenchOptions,
    model: str,
    result: LoadResult,
    metrics: Metrics,
    prices: Cost | None,
) -> dict[str, Any]:
    """The content of --save-result's file; with --save-detailed, a list per request under each of vLLM's names."""
    found: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": model,
        "tokenizer_id": None,
        "num_prompts": len(result.records) + len(result.others) + result.num_unfinished,
        **dict(options.metadata),
        "request_rate": _in_json(options.request_rate),
        "burstiness": _in_json(options.burstiness),
        **_ramp_json(options),
        "max_concurrency": options.max_concurrency,
        "workload": options.workload,
        "trace": options.trace and options.trace.name,
        "max_seconds": options.max_seconds,
        "warmup_seconds": options.warmup_seconds,
        "latencies_from": "intended" if any(record.intended is not None for record in result.records) else "sent",
        "seed": options.seed,
        "duration": metrics.duration,
        "completed": metrics.completed,
        "failed": metrics.failed,
        "unfinished": result.num_unfinished,
        "total_input_tokens": metrics.total_input,
        "cached_input_tokens": metrics.cached_input,
        "total_output_tokens": metrics.total_output,
        "request_throughput": metrics.request_throughput,
        "request_goodput": metrics.request_goodput,
        "output_throughput": metrics.output_throughput,
        "output_goodput": metrics.output_goodput,
        "steady_output_throughput": metrics.steady_output,
        "total_token_throughput": metrics.total_throughput,
        "max_output_tokens_per_s": metrics.max_output_per_s,
        "max_concurrent_requests": metrics.max_concurrent,
    }
    if options.save_detailed:
        found |= _detailed(result.records)
    for name in options.percentile_metrics:
        found |= _latency_json(metrics, name)
    if prices is not None:
        found |= _cost_json(prices, options)
    return found


def check_metadata(options: BenchOptions) -> None:
    """Raise BenchError for --metadata that the file's own keys would take the place of, which a file of nothing has."""
    nothing = LoadResult([], duration=1.0)
    content = result_json(options, "", nothing, *evaluate(nothing, options))
    for name, value in options.metadata:
        if content[name] != value:
            raise BenchError(f"--metadata {name}={value}: the file has another {name}; give it a name of its own")


def _in_json(value: float | None) -> float | str | None:
    """A number for JSON, which has no infinity: vLLM writes "inf"."""
    return "inf" if value == float("inf") else value


def _ramp_json(options: BenchOptions) -> dict[str, Any]:
    names = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
    return {name: getattr(options, name) for name in names} if options.ramp_up_strategy else {}


def _latency_json(metrics: Metrics, name: str) -> dict[str, float]:
    found = metrics.latencies[name]
    return {
        f"mean_{name}_ms": found.mean,
        f"median_{name}_ms": found.median,
        f"std_{name}_ms": found.std,
        **{f"p{_percentile(p)}_{name}_ms": value for p, value in found.percentiles.items()},
    }


def _cost_json(prices: Cost, options: BenchOptions) -> dict[str, float | None]:
    return {
        "cost_per_hour": options.cost_per_hour,
        "num_gpus": options.num_gpus,
        "usd_per_1m_output_tokens": prices.per_1m_output,
        "usd_per_1m_total_tokens": prices.per_1m_total,
        "usd_per_1m_output_tokens_at_slo": prices.per_1m_output_at_slo,
    }


def _detailed(records: Sequence[Record]) -> dict[str, list[Any]]:
    """A failed request has the text that came, its error, and an output length of 0, as in vLLM.

    start_times are those from which latencies count, so that start + TTFT is the first token, as in vLLM's files.
    """
    return {
        "input_lens": [record.input_len for record in records],
        "output_lens": [record.output_len if record.error is None else 0 for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [record.itls for record in records],
        "latencies": [record.latency for record in records],
        "start_times": [record.begin for record in records],
        "sent_times": [record.start for record in records],
        "generated_texts": ["".join(record.pieces) for record in records],
        "errors": [record.error or "" for record in records],
    }


def save(content: Mapping[str, Any], options: BenchOptions, model: str) -> Path:
    """Write the JSON file under --result-dir, or add a line to it; returns its path."""
    path = result_path(options, model, content["date"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if options.append_result else "w", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
    return path


def result_path(options: BenchOptions, model: str, date: str) -> Path:
    """Where results go: --result-filename, or vLLM's name for them."""
    concurrency = "" if options.max_concurrency is None else f"-concurrency{options.max_concurrency}"
    rate = f"{options.request_rate}qps"
    if options.ramp_up_strategy is not None:
        rate = f"ramp-up-{options.ramp_up_strategy}-{options.ramp_up_start_rps}qps-{options.ramp_up_end_rps}qps"
    base = model.rstrip("/").rpartition("/")[2]
    name = options.result_filename or f"{options.label or options.backend}-{rate}{concurrency}-{base}-{date}.json"
    return Path(options.result_dir or ".") / name
