"""`octavo top`: figures between two pages of /metrics, a real vLLM's among them, and the command over real sockets."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from scripted_server import Asked, serving, whole
from terminal import CTRL_C, terminal

from octavo.bench.scrape import GENERATED, ScrapeError, figures, percentile, read_page
from octavo.cli import main
from octavo.own_server import OwnServer

VLLM = Path(__file__).parents[1] / "fixtures/vllm-metrics"
BOUNDS = (0.01, 0.1, 1.0, float("inf"))


def page(*engines: tuple[float, list[int]]) -> str:
    """Of each engine: the tokens that it has generated, and how many first tokens came within each of BOUNDS."""
    lines = []
    for engine, (tokens, counts) in enumerate(engines):
        labels = f'engine="{engine}",model_name="some/model"'
        lines += [f"vllm:generation_tokens_total{{{labels}}} {tokens}"]
        lines += [f"vllm:num_requests_running{{{labels}}} {engine + 1}", f"vllm:kv_cache_usage_perc{{{labels}}} 0.25"]
        lines += [f"vllm:prefix_cache_queries_total{{{labels}}} 100", f"vllm:prefix_cache_hits_total{{{labels}}} 40"]
        lines += [
            f'vllm:time_to_first_token_seconds_bucket{{{labels},le="{bound}"}} {count}'
            for bound, count in zip(BOUNDS, counts, strict=True)
        ]
    return "\n".join(lines) + "\n"


def test_figures_of_engines_alone_and_together() -> None:
    before = read_page(page((100, [0, 10, 10, 10]), (50, [0, 0, 5, 5])), 10.0)
    after = read_page(page((300, [10, 20, 20, 20]), (90, [0, 0, 15, 15])), 12.0)
    assert after.model == "some/model"
    assert after.engines == ["0", "1"]
    first = figures(before, after, ["0"])
    assert (first.output_rate, first.running, first.waiting, first.is_up) == (100.0, 1.0, None, None)
    assert first.percentiles["ttft"] == pytest.approx(
        {50: 0.005, 90: 0.009, 99: 0.0099}
    )  # all ten of them within 10 ms
    both = figures(before, after, ["0", "1"])
    assert (both.output_rate, both.running, both.kv_usage, both.prefix_hits) == (120.0, 3.0, 0.25, None)
    assert both.percentiles["ttft"][50] == pytest.approx(0.01)
    assert both.percentiles["ttft"][90] == pytest.approx(0.1 + 0.9 * (18 - 10) / 10)
    ever = figures(None, after, ["0", "1"])
    assert (ever.output_rate, ever.prefix_hits) == (None, 0.4)
    assert ever.percentiles["ttft"][50] == pytest.approx(0.01 + 0.09 * (17.5 - 10) / 10)
    assert ever.percentiles["tpot"] == {}


def test_counters_that_begin_anew() -> None:
    """As after a restart of the server: what it has counted since is all that is known."""
    before = read_page(page((1000, [90, 95, 99, 99])), 10.0)
    after = read_page(page((60, [0, 4, 4, 4])), 12.0)
    found = figures(before, after, ["0"])
    assert found.output_rate == 30.0
    assert found.percentiles["ttft"][50] == pytest.approx(0.01 + 0.09 / 2)


def test_percentiles_are_as_exact_as_the_buckets() -> None:
    bounds = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, float("inf")]
    seconds = [random.Random(seed).lognormvariate(-3, 0.7) for seed in range(1000)]
    counts = {bound: float(sum(value <= bound for value in seconds)) for bound in bounds}
    for share in (0.5, 0.9, 0.99):
        true = float(np.quantile(seconds, share, method="inverted_cdf"))
        found = percentile(counts, share)
        assert found is not None
        high = min(bound for bound in bounds if true <= bound)
        assert high / 2 <= found <= high
    assert percentile({1.0: 0.0, float("inf"): 3.0}, 0.5) == 1.0  # beyond the last bound: that bound


def test_the_pages_of_a_real_vllm() -> None:
    """Recorded around a known load; README.md beside them tells which."""
    before = read_page((VLLM / "before.txt").read_text("utf-8"), 0.0)
    after = read_page((VLLM / "after.txt").read_text("utf-8"), 10.0)
    told = json.loads((VLLM / "load.json").read_text("utf-8"))
    found = figures(before, after, after.engines)
    assert after.model == told["model"]
    assert found.output_rate == told["completion_tokens"] / 10
    assert found.prompt_rate == told["prompt_tokens"] / 10
    assert found.request_rate == told["requests"] / 10
    assert (found.running, found.waiting, found.is_up) == (0.0, 0.0, None)
    assert found.prefix_hits is not None
    assert 0.3 < found.prefix_hits < 2 / 3  # whole blocks of the prompt that three of the four share, the first aside
    for latency in found.percentiles.values():
        assert 0 < latency[50] <= latency[90] <= latency[99]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", f"has no {GENERATED}"),
        ('sglang:gen_throughput{engine="0"} 3\n', f"has no {GENERATED}"),
        ("<!DOCTYPE html><p>no metrics</p>", "can't be read"),
        (page((1, [1, 1, 1, 1])).replace(',le="1.0"', ""), "_seconds_bucket has no number under the label le"),
        (page((1, [1, 1, 1, 1])).replace('le="1.0"', 'le="x"'), "_seconds_bucket has no number under the label le"),
    ],
)
def test_pages_without_the_figures(text: str, said: str) -> None:
    with pytest.raises(ScrapeError, match=said):
        read_page(text, 0.0)


def test_what_octavo_tells_is_what_it_did(octavo_server: OwnServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens are counted in the answers; the command reads the same server."""
    with httpx.Client(
        base_url=octavo_server.url, headers={"Authorization": f"Bearer {octavo_server.api_key}"}, timeout=60
    ) as client:
        before = read_page(client.get("/metrics").text, 0.0)
        for length in (3, 5, 9):
            body = {"prompt": "the file", "max_tokens": length, "ignore_eos": True}
            assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == length
        found = figures(before, read_page(client.get("/metrics").text, 2.0), ["0"])
    assert found.output_rate == 17 / 2
    assert found.request_rate == 3 / 2
    assert found.is_up == 1.0
    assert all(latency[50] > 0 for latency in found.percentiles.values())
    assert main(["top", octavo_server.url, "--json", "--interval", "0.1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == before.model
    assert told["all"]["output_rate"] == 0.0
    assert told["engines"]["0"]["is_up"] == 1.0
    assert main(["top", f"{octavo_server.url}/v1", "--once", "--interval", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "1/1" in printed
    assert "first token (TTFT)" in printed


def plain(text: str, status: str = "200 OK") -> list[bytes]:
    return [f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (lambda _: whole({"detail": "Not Found"}, "404 Not Found"), "/metrics: HTTP 404: this server shows no metrics"),
        (lambda _: whole({"error": {"message": "which key?"}}, "401 Unauthorized"), "HTTP 401: which key?; --api-key"),
        (lambda _: plain("up 1\n"), f"/metrics: the page has no {GENERATED}"),
    ],
)
def test_a_server_without_figures(
    capsys: pytest.CaptureFixture[str], script: Callable[[Asked], list[bytes]], said: str
) -> None:
    with serving(script) as server:
        assert main(["top", server.url, "--once"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"octavo top: {server.url}/metrics: ")
    assert said in error
    assert error.count("\n") == 1


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "http://127.0.0.1:1", "--once"]) == 1
    assert "octavo top: http://127.0.0.1:1: " in capsys.readouterr().err
    assert main(["top", "127.0.0.1:8000"]) == 1
    assert "'127.0.0.1:8000' is not a URL such as" in capsys.readouterr().err
    for url in ("http://[::1", "http://127.0.0.1:port", "http://a..b"):
        assert main(["top", url, "--once"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"octavo top: {url}: ")
        assert "nvalid port" in error or "label empty" in error


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda _: plain(page((1, [1, 1, 1, 1])))) as server:
        assert main(["top", server.url, "--once", "--interval", "0.1", "--api-key", "sesame"]) == 0
        monkeypatch.setenv("OPENAI_API_KEY", "from-env")
        assert main(["top", server.url, "--once", "--interval", "0.1"]) == 0
        keys = [asked.headers["authorization"] for asked in server.asked]
    assert keys == ["Bearer sesame"] * 2 + ["Bearer from-env"] * 2


def test_without_a_terminal_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda _: plain(page((1, [1, 1, 1, 1])))) as server:
        assert main(["top", server.url]) == 1
    assert "no terminal to show it in; --once" in capsys.readouterr().err


def test_the_dashboard_outlives_its_server() -> None:
    """It shows what changes, says that the server is gone, goes on when that is there again, and ends on Ctrl-C."""
    looked = 0

    def script(_: Asked) -> list[bytes]:
        nonlocal looked
        looked += 1
        if looked in (3, 4):
            return plain("away", "503 Service Unavailable")
        return plain(page((looked * 1000, [1, 1, 1, 1])).replace("some/model", "some\x1b[31m/model"))

    with serving(script) as server, terminal("top", server.url, "--interval", "0.1", TERM="xterm") as at:
        at.wait_for("output tokens/s, up to")
        at.wait_for("no answer: ")
        at.wait_for("HTTP 503")
        at.wait_for("output tokens/s, up to")
        assert "\x1b[31m" not in at.printed  # a server doesn't steer the terminal
        at.press(CTRL_C)
        assert at.end() == 0
