"""`octavo cost` as a user runs it, over real sockets, against a scripted server with latencies that are known."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import msgspec
import pytest
from scripted_server import DONE, Asked, ScriptedServer, event, serving, stream, text, usage, whole

from octavo.bench.http import HttpError
from octavo.cli import main
from octavo.jobs.cost import client
from octavo.jobs.cost import quality as cost_quality
from octavo.jobs.cost.client import Asking, Measured, ServerError
from octavo.jobs.cost.loads import SEGMENTS, WARM_UP, Load, Sample
from octavo.jobs.cost.machine import EnergyMeter
from octavo.jobs.cost.quality import Answered, of_answers
from octavo.jobs.cost.state import State

SERVICE = 0.02
TOKENS = 4
SLO = {"ttft": 60.0}


class Queue:
    """Answers one request at a time, after SERVICE seconds; before number `stalled`, `stall` seconds pass."""

    def __init__(self, stalled: int = -1, stall: float = 0.0) -> None:
        self._lock = asyncio.Lock()
        self._stalled = stalled
        self._stall = stall
        self._count = 0

    def __call__(self, asked: Asked) -> Iterable[bytes] | AsyncIterator[bytes]:
        if asked.path == "/v1/models":
            return whole({"data": [{"id": "some/model", "owned_by": "somebody"}]})
        if asked.path == "/version":
            return whole({"version": "1.2"})
        if asked.path == "/tokenize":
            words = asked.json["prompt"].split()
            return whole({"count": 1 + len(words), "max_model_len": 4096, "tokens": list(range(1 + len(words)))})
        if asked.json.get("prompt_logprobs"):
            return whole(self._logprobs(asked))
        return self._answer(asked)

    def _logprobs(self, asked: Asked) -> dict[str, object]:
        """Each token has half of the probability and the likeliest other one the other half."""
        half, other = {"logprob": math.log(0.5), "rank": 2}, {"logprob": -0.69, "rank": 1}
        rows = [{str(token): half, "1000": other} for token in asked.json["prompt"]]
        return {"choices": [{"text": "", "prompt_logprobs": [None, *rows[1:]]}]}

    async def _answer(self, asked: Asked) -> AsyncIterator[bytes]:
        async with self._lock:
            await asyncio.sleep(SERVICE + (self._stall if self._count == self._stalled else 0.0))
            self._count += 1
        count = asked.json["max_tokens"]
        words = len(asked.json["prompt"].split()) + 1
        events = [event(text(" word"))] * (count - 1) + [
            event(text(" end", "length")),
            event(usage(words, count)),
            DONE,
        ]
        for piece in stream(events):
            yield piece


def refusing(asked: Asked) -> Iterable[bytes]:
    if asked.path == "/v1/models":
        return whole({"data": [{"id": "some/model"}]})
    return whole({"error": {"message": "out of order"}}, "500 Internal Server Error")


def asking() -> Asking:
    return Asking(input_len=8, output_len=TOKENS)


def measuring(server: ScriptedServer) -> Measured:
    return Measured(server.url, None, asking())


def test_a_closed_load_finds_the_rate_of_the_server() -> None:
    with serving(Queue()) as server, measuring(server) as measured:
        run = measured.measure(Load("closed", 1.0, 1, concurrency=3))
        alone = measured.measure(Load("prefill", 0.5, 2, concurrency=3))
        cached = measured.measure(Load("cached", 0.5, 3, concurrency=3))
        prompts = [asked.json["prompt"] for asked in server.asked if asked.path == "/v1/completions"]
    totals = Sample(run, SLO).totals
    assert 0 < totals.answered <= 1.1 / SERVICE
    assert totals.output_tokens == pytest.approx(totals.answered * TOKENS, rel=0.15)
    assert totals.input_tokens == pytest.approx(totals.answered * 8, rel=0.15)
    assert set(run.answers.inputs) == {8}
    assert set(run.answers.outputs) == {TOKENS}
    assert len(run.output_tokens) == SEGMENTS
    assert min(run.answers.at) >= WARM_UP
    assert max(run.answers.at) < 1.0
    assert set(alone.answers.outputs) == {1}
    assert len(set(prompts[-10:])) == 3
    assert set(prompts[-10:]) <= set(prompts[:-10])  # what is cached was sent before
    assert len(cached.answers.at) > 10


def test_an_open_load_sends_at_its_times_and_counts_from_them() -> None:
    """A request that was meant to be sent while the server stalled has waited until the stalled one was answered."""
    with serving(Queue(stalled=8, stall=0.5)) as server, measuring(server) as measured:
        run = measured.measure(Load("open", 1.2, 1, rate=20.0))
    requests = sorted(zip(run.answers.at, run.answers.ttft, strict=True))
    at, ttft = next(request for request in requests if request[1] > 500)
    behind = [request for request in requests if at < request[0] < at + 0.4]
    assert len(behind) >= 3
    assert all(own_at * 1e3 + own_ttft > at * 1e3 + ttft for own_at, own_ttft in behind)
    assert Sample(run, SLO).num_missed > len(behind)


def test_a_load_so_small_that_no_request_comes_is_one_without_requests() -> None:
    with serving(Queue()) as server, measuring(server) as measured:
        run = measured.measure(Load("open", 0.2, 1, rate=0.01))
    assert Sample(run, SLO).num_requests == 0


def test_requests_that_fail_or_never_end_are_beyond_the_slo() -> None:
    with serving(refusing) as server, Measured(server.url, None, asking()) as measured:
        run = measured.measure(Load("open", 1.5, 1, rate=10.0))
        with pytest.raises(ServerError, match="a request failed: HTTP 500: out of order"):
            measured.warm_up(2, 0)
    sample = Sample(run, SLO)
    assert 0 < sample.num_requests == sample.num_missed == len(run.failed_in)
    assert run.errors == ["HTTP 500: out of order"]
    with serving(Queue(stalled=0, stall=60.0)) as server, measuring(server) as measured:
        run = measured.measure(Load("open", 0.3, 1, rate=30.0))
    assert not run.answers.at
    assert Sample(run, SLO).num_missed > 0
    assert run.errors == ["no whole answer 0.3 s after the load's end"]


def test_a_load_s_clock_begins_when_its_requests_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk through a large heap comes before: it takes longer here than the load and the wait for its answers."""
    ready: list[float] = []
    read: list[float] = []

    def slow_collect() -> int:
        time.sleep(0.7)
        ready.append(time.perf_counter())
        return 0

    def joules() -> float:
        read.append(time.perf_counter())
        return 7.0 * len(read)

    monkeypatch.setattr(EnergyMeter, "find", lambda: EnergyMeter(joules, "a meter"))
    monkeypatch.setattr(client, "FIRST_GUESS", 2 / SERVICE)  # or prompts run out, and the load is made again
    with serving(Queue()) as server, measuring(server) as measured:
        monkeypatch.setattr(gc, "collect", slow_collect)
        run = measured.measure(Load("open", 0.3, 1, rate=20.0))
        assert len(run.answers.at) > 2
        assert (run.errors, run.failed_in) == ([], [])
        run = measured.measure(Load("closed", 0.3, 1, concurrency=3))
    assert run.joules == 7.0
    assert read[-1] - ready[-1] > 0.29  # the load's end; uvloop counts whole milliseconds


def hanging(path: str) -> Callable[[Asked], Iterable[bytes] | AsyncIterator[bytes]]:
    """A server that takes requests for `path` and never answers."""
    queue = Queue()

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    return lambda asked: never() if asked.path == path else queue(asked)


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/tokenize"])
def test_a_server_that_hangs_is_refused_and_says_at_what(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ASK_SECONDS", 0.2)
    with serving(hanging(path)) as server, pytest.raises(ServerError) as error:
        measuring(server)
    assert str(error.value).startswith(f"{server.url}: ")
    assert str(error.value).endswith(f" {path}: no answer within 0.2 s")


def test_answers_that_never_end_end_a_closed_load_and_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.2)
    monkeypatch.setattr(cost_quality, "WINDOW_SECONDS", 0.2)
    with serving(hanging("/v1/completions")) as server, measuring(server) as measured:
        with pytest.raises(ServerError, match=r"answers had not ended 0\.2 s after their load began"):
            measured.warm_up(2, 0)
        for load in (Load("closed", 0.1, 1, concurrency=2), Load("prefill", 0.1, 2, concurrency=2)):
            with pytest.raises(ServerError, match=r"answers had not ended 0\.3 s after"):
                measured.measure(load)
        with pytest.raises(HttpError, match=r"POST /v1/completions: no answer within 0\.2 s"):
            measured.answers([[1, 2, 3]])


def test_no_load_has_prompts_of_the_warm_up() -> None:
    """Or the first closed load would meet a prefix cache that has them."""
    with serving(Queue()) as server, measuring(server) as measured:
        measured.warm_up(4, seed=5)
        warm = {asked.json["prompt"] for asked in server.asked if asked.path == "/v1/completions"}
        measured.measure(Load("closed", 0.2, 5, concurrency=1))
        prompts = [asked.json["prompt"] for asked in server.asked if asked.path == "/v1/completions"]
    assert len(warm) == 8 < len(prompts)
    assert not warm & set(prompts[8:])


SMALL = ("--repetitions", "1", "--concurrency", "2", "--input-len", "8", "--output-len", str(TOKENS))
SHORT = (*SMALL, "--seconds", "0.2", "--slo", "ttft:600", "--slo-percentile", "90", "--no-quality")


@pytest.mark.slow  # ten seconds, most of them of waiting
def test_ctrl_c_keeps_what_is_measured_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server sends the signal, in the middle of a load. Other prices are another report of the same loads."""
    queue = Queue()

    def interrupting(asked: Asked) -> Iterable[bytes] | AsyncIterator[bytes]:
        if asked.path == "/v1/completions" and len(server.asked) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return queue(asked)

    out = tmp_path / "report"
    with serving(interrupting) as server:
        words = ["cost", f"one={server.url}/v1", "-o", str(out), *SHORT]
        priced = ["--cost-per-hour", "1", "--tokens-per-day", "1m"]
        assert main([*words, *priced]) == 130
        kept = read(out).servers[0].runs
        assert kept
        assert not read(out).servers[0].done
        assert "not measured to the end; the same command goes on with it" in (out / "report.md").read_text()
        assert main([*words, *priced]) == 0
        printed = capsys.readouterr()
        asked = len(server.asked)
        other = ["--machine", "aws-p5.48xlarge", "--compare-price", "api=1/2"]
        assert main([*words, *other]) == 0
        assert "/v1/completions" not in {each.path for each in server.asked[asked:]}
    with serving(refusing) as broken:  # a model that can't be measured leaves the others in the report
        assert main(["cost", f"two={broken.url}", *words[2:], *other]) == 1
    assert [each.label for each in read(out).servers] == ["two", "one"]
    one = read(out).servers[1]
    assert one.runs[: len(kept)] == kept
    assert one.done
    assert one.figures is not None
    assert 0 < one.figures.values["saturation_rate"].value < 1.1 / SERVICE
    assert "octavo cost: interrupted; the same command goes on with what is measured" in printed.err
    assert "per million output tokens, with 90 % of the requests within TTFT 600 ms." in printed.out
    assert f"written: {out / 'report.html'}" in printed.out
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", "report.md", "points.csv"}
    page = (out / "report.md").read_text()
    assert "eight H100 SXM" in page
    assert "one against api" in page
    assert "two: a request failed: HTTP 500: out of order" in page
    assert "one: a server that was running, somebody 1.2" in page


def read(out: Path) -> State:
    return msgspec.json.decode((out / "report.json").read_bytes(), type=State)


def test_servers_of_somebody_are_compared_by_their_logprobs_of_the_prompt() -> None:
    with serving(Queue()) as server, measuring(server) as measured:
        windows = measured.windows("word " * 300, 280)
        answered = measured.answers(windows)
    assert [len(window) for window in windows] == [256, 24]
    quality = of_answers(answered, answered)
    assert quality.perplexity is not None
    assert quality.perplexity.value == pytest.approx(2.0)
    assert quality.top1 is not None
    assert quality.top1.value == 1.0
    assert quality.num_tokens == 278
    assert quality.missing.startswith("KL: ")
    other = Answered(answered.log_probs, [[row[0] + 1, *row[1:]] for row in answered.likeliest])
    differing = of_answers(answered, other).top1
    assert differing is not None
    assert differing.value == pytest.approx(276 / 278)
    with serving(refusing) as server, measuring(server) as measured, pytest.raises(HttpError, match="out of order"):
        measured.answers(windows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["m"], "a price is needed: --cost-per-hour DOLLARS, or --machine NAME"),
        (["m", "--cost-per-hour", "1", "--machine", "x"], "a price is needed"),
        (["m", "--machine", "abacus"], "no machine 'abacus' in the table of prices; it has aws-g5.xlarge,"),
        (["./nowhere", "--cost-per-hour", "1"], "./nowhere: no such directory"),
        (["x=./m@int5", "--cost-per-hour", "1"], "'int5' is no scheme"),
        (["http://127.0.0.1:1", "--cost-per-hour", "1"], "http://127.0.0.1:1: no connection to 127.0.0.1:1"),
        (["http://host:port", "--cost-per-hour", "1"], "http://host:port: Port could not be cast to integer"),
        (["http://[host", "--cost-per-hour", "1"], "http://[host: Invalid IPv6 URL"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *words, "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("octavo cost: ")
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


VECTORS = "it writes no answers to prompts but makes vectors or scores; octavo bench serve --backend openai-embeddings"


@pytest.mark.parametrize(
    ("config", "flags", "says"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, [], VECTORS),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, [], VECTORS),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]}, [], VECTORS),
        ({"model_type": "llama"}, ["--", "--is-embedding"], VECTORS),
        ({"model_type": "llama"}, ["--", "--task=embed"], VECTORS),
        ({"model_type": "llama"}, ["--", "--runner", "pooling", "--dtype", "int8"], VECTORS),
        ({"model_type": "bert"}, ["--", "--runner", "generate"], "--runner generate: bert is an encoder"),
        ({"model_type": "whisper"}, [], "it writes no answers to prompts: whisper reads recordings"),
    ],
)
@pytest.mark.parametrize("scheme", ["", "@int8"])
def test_a_model_that_writes_nothing_is_refused_before_anything_starts(
    config: dict[str, object],
    flags: list[str],
    says: str,
    scheme: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    words = ["cost", f"m={model}{scheme}", "-o", str(tmp_path / "out"), "--cost-per-hour", "1", *flags]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("octavo cost: m: ")
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_checkpoints_are_quantized_served_and_compared(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real servers of the tiny model, a minute of them; run with `pytest -m slow`."""
    out = tmp_path / "report"
    tiny = str(fixtures / "tiny")
    words = ["cost", tiny, f"w8={tiny}@int8/rtn", "-o", str(out), *SMALL, "--seconds", "1", "--eval-tokens", "300"]
    flags = ["--cost-per-hour", "1", "--slo", "ttft:2000", "--", "--dtype", "float32"]
    assert main([*words, *flags]) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    first, second = report["servers"]
    assert (out / "models" / "tiny-W8A8-rtn" / "config.json").is_file()
    assert first["quality"]["kl"]["value"] == 0
    assert 0 < second["quality"]["kl"]["value"] < 0.05
    assert first["figures"]["values"]["memory"]["value"] > 1e8
    assert first["start_seconds"] > 0
