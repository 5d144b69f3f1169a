"""The page of charts of a load: what is drawn is what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench_server import bench, completion, server_like_vllm
from scripted_server import serving

from octavo.bench.load import LoadResult, Record, Usage
from octavo.bench.metrics import measure
from octavo.bench.plots import page
from octavo.cli import main


def charts_of(html: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The points that the page's library is given: by chart's title and series."""
    titles = re.findall("<figcaption>(.*?)</figcaption>", html)
    found = re.search('<script type="application/json" id="charts">(.*?)</script>', html)
    assert found
    configs = json.loads(found[1])
    return {
        title: {dataset["label"]: dataset["data"] for dataset in config["data"]["datasets"]}
        for title, config in zip(titles, configs, strict=True)
    }


def record(begin: float, times: list[float]) -> Record:
    usage = Usage(prompt_tokens=10, completion_tokens=len(times))
    return Record(10, begin + 0.01, times, usage=usage, finish_reason="stop", intended=begin)


def test_charts_have_the_times_of_the_requests() -> None:
    """Begun at 100 s: one request with gaps of 10 ms, and one with a gap of 0.2 s."""
    fast = record(100.0, [100.5, 100.51, 100.52])
    slow = record(101.0, [101.25, 101.45])
    failed = Record(10, 101.5, error="HTTP 500")
    result = LoadResult([fast, slow, failed], 2.0, begin=100.0, until=102.0)
    html = page("a <b>", "what", result, measure(result, [99], {}), (25.0, 50.0)).to_html()
    assert "a &lt;b&gt;" in html
    charts = charts_of(html)
    timeline = charts["Requests: a bar from begin to end, a mark at the first token"]
    (first,) = timeline["longest gap under 25 ms"]
    (second,) = timeline["50 ms and more"]
    assert (first["x"], first["xMin"], first["xMax"], first["y"]) == (0.5, 0, 0.52, 0)
    assert (second["x"], second["xMin"], second["xMax"], second["y"]) == (1.25, 1, 1.45, 1)
    latencies = charts["Latency of each request by when it began"]
    assert [point["y"] for point in latencies["TTFT"]] == pytest.approx([500, 250])
    assert [point["y"] for point in latencies["E2EL"]] == pytest.approx([520, 450])
    shares = charts["Share of values that are at most so long"]
    assert (shares["ITL"][0]["x"], shares["ITL"][-1]["x"]) == pytest.approx((10, 200), rel=1e-3)
    rates = charts["Output tokens a second"]["output tokens/s"]
    assert sum(point["y"] for point in rates) * (rates[1]["x"] - rates[0]["x"]) == pytest.approx(5, rel=1e-2)
    assert {point["y"] for point in charts["Requests under way"]["requests under way"]} == {0, 1}
    assert [(point["x"], point["y"]) for point in charts["Tokens of prompts and answers"]["requests"]] == [
        (10, 3),
        (10, 2),
    ]


def test_a_page_is_written_beside_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--num-prompts",
        "4",
        "--random-input-len",
        "20",
        "--random-output-len",
        "3",
        "--result-dir",
        str(tmp_path),
    )
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *options, "--plot-timeline", "--result-filename", "r.json") == 0
        assert bench(server, *options, "--plot", "--timeline-itl-thresholds", "1,2") == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".html"]
    html = (tmp_path / "r.html").read_text()
    assert len(charts_of(html)["Latency of each request by when it began"]["TTFT"]) == 4
    assert "as the server&#x27;s /tokenize counts them" in html
    assert f"written: {tmp_path / 'r.html'}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "--timeline-itl-thresholds", "50,25"])
    assert "the smaller first" in capsys.readouterr().err


def test_a_load_without_an_answer_has_a_page_too() -> None:
    result = LoadResult([Record(10, 1.0, error="HTTP 500")], 1.0)
    assert (
        "HTTP" not in page("x", "what", result, measure(result, [], {}), (25.0, 50.0)).to_html().partition("<script")[0]
    )
