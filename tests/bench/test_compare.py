"""Comparisons: intervals against theory and simulation, verdicts, and files that can't be compared."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_server import bench, completion, server_like_vllm
from scripted_server import serving

from octavo.bench.compare import Side, _statistic, compare, lines, setting_notes, welch
from octavo.cli import main


def run(ttfts: list[float], **more: Any) -> dict[str, Any]:
    """A detailed result of requests with these TTFTs, each of three tokens 10 ms apart, sent one a second."""
    count = len(ttfts)
    itls = [[0.01, 0.01]] * count
    ms = 1e3 * np.asarray(ttfts)
    return {
        "request_throughput": 1.0,
        "output_throughput": 3.0,
        "total_token_throughput": 13.0,
        "mean_ttft_ms": float(ms.mean()),
        "std_ttft_ms": float(ms.std()),
        "p90_ttft_ms": float(np.percentile(ms, 90)),
        "mean_itl_ms": 10.0,
        "mean_tpot_ms": 10.0,
        "median_e2el_ms": float(np.median(ms)) + 20,
        "errors": [""] * count,
        "ttfts": ttfts,
        "itls": itls,
        "input_lens": [10] * count,
        "output_lens": [3] * count,
        "start_times": [float(i) for i in range(count)],
        "duration": float(count),
        "request_rate": 1.0,
        **more,
    }


def side(*runs: dict[str, Any], name: str = "x") -> Side:
    return Side(name, list(runs))


def test_welchs_interval_is_the_textbooks() -> None:
    """Logarithms of variance ln(2)^2 in both, three each: four degrees of freedom, t = 2.776."""
    half = 2.776 * math.sqrt(2 * math.log(2) ** 2 / 3)
    assert welch([1, 2, 4], [2, 4, 8]) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))
    assert welch([3, 3, 3], [6, 6, 6]) == pytest.approx((2, 2))


def test_repetitions_without_a_difference_seem_different_once_in_twenty_times() -> None:
    rng = random.Random(5)
    misses = 0
    for _ in range(1000):
        low, high = welch(*([rng.lognormvariate(0, 0.2) for _ in range(4)] for _ in range(2)))
        misses += not low <= 1 <= high
    assert misses == pytest.approx(50, abs=3.5 * math.sqrt(1000 * 0.05 * 0.95))


def test_the_bootstrap_agrees_with_the_delta_method() -> None:
    rng = random.Random(1)
    ours = [rng.expovariate(10) for _ in range(400)]
    theirs = [rng.expovariate(8) for _ in range(400)]
    found = {comparison.key: comparison for comparison in compare(side(run(ours)), side(run(theirs)))}
    mean = found["mean_ttft_ms"]
    assert mean.ratio == pytest.approx(statistics.fmean(theirs) / statistics.fmean(ours))
    error = math.sqrt(sum((statistics.stdev(x) / statistics.fmean(x)) ** 2 / 400 for x in (ours, theirs)))
    assert mean.interval is not None
    assert [math.log(bound / mean.ratio) for bound in mean.interval] == pytest.approx(
        [-1.96 * error, 1.96 * error], rel=0.12
    )
    assert mean.how == "bootstrap over requests"
    assert found["mean_itl_ms"].interval == pytest.approx((1, 1))
    assert found["mean_itl_ms"].verdict == "no difference seen"
    assert "std_ttft_ms" not in found


def test_the_bootstrap_of_throughputs_is_of_rates() -> None:
    """The same hundred requests in half the time: twice the throughput, of which the parts of a run know nothing."""
    slow = run([0.1] * 100)
    fast = run([0.1] * 100, start_times=[i / 2 for i in range(100)], duration=50.0)
    fast |= {name: 2 * slow[name] for name in ("request_throughput", "output_throughput", "total_token_throughput")}
    found = {comparison.key: comparison for comparison in compare(side(slow), side(fast))}
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        assert found[name].interval == pytest.approx((2, 2), rel=0.1)
        assert found[name].verdict == "100.0 % more: better"


def test_a_side_without_spread_has_the_other_ones_degrees_of_freedom() -> None:
    """Eight equal values beside eight others: seven degrees, t = 2.365. Their quotient may come out as 6.999..."""
    for scale in (1.0, 1.3, 1.7, 3.1):
        theirs = [scale * (1 + 0.1 * i) for i in range(8)]
        half = 2.365 * statistics.stdev(map(math.log, theirs)) / math.sqrt(8)
        low, high = welch([1] * 8, theirs)
        assert math.log(high / low) / 2 == pytest.approx(half)


def test_a_figure_that_is_0_on_one_side_is_not_dropped() -> None:
    ours = side(run([0.1], request_goodput=5.0))
    theirs = side(run([0.1], request_goodput=0.0))
    comparisons = compare(ours, theirs)
    assert "request_goodput" not in {comparison.key for comparison in comparisons}
    assert lines(ours, theirs, comparisons)[-1] == "  note: good requests/s has no ratio: 5 and 0"


def test_files_that_say_less_or_no_numbers_have_no_interval() -> None:
    """A result of an older vLLM has no start_times; NaN is in JSON that Python writes."""
    old = run([0.1, 0.2])
    del old["start_times"]
    found = compare(side(old), side(old | {"p99_ttft_ms": math.nan, "x_y_ttft_ms": 1.0}))
    assert {comparison.interval for comparison in found} == {None}
    assert compare(side(run([0.1], mean_ttft_ms=math.nan)), side(run([0.1]))) == compare(
        side({key: value for key, value in run([0.1]).items() if key != "mean_ttft_ms"}), side(run([0.1]))
    )
    bare = {"output_throughput": 3.0, "tight_slo_ttft_ms": 1.0}
    assert [comparison.key for comparison in compare(side(bare), side(bare))] == ["output_throughput"]


def test_quantiles_of_weights_are_those_of_repeated_values() -> None:
    rng = np.random.default_rng(1)
    values = np.sort(rng.random(50))
    weights = rng.integers(0, 4, 50)
    repeated = np.repeat(values, weights)
    for name, share in (("median", 50), ("p99", 99), ("p99.9", 99.9), ("p0", 0)):
        if share:
            expected = np.percentile(repeated, share, method="inverted_cdf")
            assert _statistic(name)(values, weights) == pytest.approx(expected)
    assert _statistic("mean")(values, weights) == pytest.approx(repeated.mean())


def test_verdicts_say_what_is_better_and_what_was_not_seen() -> None:
    ours = side(*(run([0.1 + i / 1000] * 5) for i in range(3)), name="a.jsonl")
    slower = [run([0.15 + 1.5 * i / 1000] * 5, output_throughput=2.0 + i / 100) for i in range(3)]
    found = {comparison.key: comparison for comparison in compare(ours, side(*slower, name="b.jsonl"))}
    assert found["mean_ttft_ms"].verdict == "50.0 % more: worse"
    assert found["output_throughput"].verdict == "33.0 % less: worse"
    assert found["request_throughput"].verdict == "no difference seen"
    assert found["mean_ttft_ms"].how == "3 and 3 runs"
    text = lines(ours, ours, compare(ours, ours))
    assert text[0] == "a.jsonl against a.jsonl"
    assert text[-2] == "  no difference seen in any of the 8 figures with an interval"
    bare = {"output_throughput": 3.0, "mean_ttft_ms": 5.0}
    (throughput, latency) = compare(side(bare), side(bare | {"mean_ttft_ms": 6.0}))
    assert (throughput.interval, latency.interval) == (None, None)
    assert latency.verdict == "no interval: no verdict"
    assert compare(side(bare), side(bare, bare))[0].how == "fewer than 3 runs"


def test_loads_that_differ_are_named() -> None:
    assert setting_notes(side(run([0.1])), side(run([0.1], request_rate=2.0))) == ["request_rate differs: 1.0 and 2.0"]
    totals = [side(run([0.1], total_input_tokens=total)) for total in (1000, 1015, 1100)]
    assert setting_notes(totals[0], totals[1]) == []
    assert setting_notes(totals[0], totals[2]) == ["total_input_tokens differs: 1000 and 1100"]
    timed = [side(run([0.1], num_prompts=count, max_seconds=10)) for count in (60, 75)]  # by chance, at one rate
    assert setting_notes(*timed) == []
    almost = side(run([0.1], request_rate=1.01))
    assert setting_notes(side(run([0.1])), almost) == ["request_rate differs: 1.0 and 1.01"]
    inf = side(run([0.1], request_rate="inf"))
    assert setting_notes(side(run([0.1])), inf) == ['request_rate differs: 1.0 and "inf"']


def test_runs_of_several_loads_are_no_repetitions() -> None:
    mixed = side(*(run([0.1], request_rate=rate) for rate in (1.0, 2.0, 4.0)), name="all.jsonl")
    text = lines(mixed, mixed, compare(mixed, mixed))
    said = "  note: request_rate differs within all.jsonl, whose runs are no repetitions then: 1.0, 2.0, 4.0"
    assert text.count(said) == 1
    same = side(*(run([0.1], total_input_tokens=total) for total in (100, 130, 160)))
    assert not any("note" in line for line in lines(same, same, compare(same, same)))


def test_files_are_compared_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs of one server, in detail; and files that are no results."""
    options = ("--num-prompts", "20", "--random-input-len", "20", "--random-output-len", "3", "--max-concurrency", "1")
    with serving(server_like_vllm(completion)) as server:
        for name in ("a.json", "b.json"):
            saved = ("--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", name)
            assert bench(server, *options, *saved) == 0
    capsys.readouterr()
    a, b, written = (str(tmp_path / name) for name in ("a.json", "b.json", "c.json"))
    assert main(["bench", "compare", a, b, "--output-json", written]) == 0
    printed = capsys.readouterr().out
    assert f"{b} against {a}" in printed
    assert "bootstrap over requests" in printed
    content = json.loads((tmp_path / "c.json").read_text())["others"][b]
    intervals = [
        (one["ratio_low"], one["ratio_high"]) for one in content if one["interval_from"].startswith("bootstrap")
    ]
    assert intervals
    assert all(low <= high for low, high in intervals)
    assert [one["ratio"] for one in content] == pytest.approx([one["other"] / one["base"] for one in content])
    assert main(["bench", "compare", a]) == 1
    assert "takes two results or more" in capsys.readouterr().err
    assert main(["bench", "compare", a, written]) == 1
    assert "no result of octavo bench" in capsys.readouterr().err
    (tmp_path / "packed").write_bytes(b"\x1f\x8b\xff")
    assert main(["bench", "compare", a, str(tmp_path / "packed")]) == 1
    assert "packed is not text" in capsys.readouterr().err
    assert main(["bench", "compare", a, str(tmp_path / "missing")]) == 1
    assert "No such file" in capsys.readouterr().err
