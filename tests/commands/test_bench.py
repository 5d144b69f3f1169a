"""`octavo bench` over real sockets against a scripted server, and its arithmetic by itself."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bench_server import (
    ENGLISH,
    asked_for_text,
    bench,
    completion,
    numbers,
    server_like_vllm,
    tokens_of,
)
from scripted_server import (
    DONE,
    HANG_UP,
    STREAM_HEAD,
    Asked,
    byte_by_byte,
    chunk,
    delta,
    event,
    serving,
    stream,
    text,
    usage,
    whole,
)

from octavo.bench.http import Client
from octavo.bench.prompts import local_vocabulary, measure_vocabulary
from octavo.bench.run import Point, Target, first_model, run_point
from octavo.bench.sources import _shuffled
from octavo.bench.traces import read_trace
from octavo.bench.workloads import WORKLOADS, make_requests
from octavo.cli import main
from octavo.own_server import OwnServer

TINY = Path(__file__).resolve().parents[1] / "fixtures/tiny"
SMALL = ("--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "5")


def test_report_has_the_lines_that_people_parse_and_exact_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Every answer byte by byte: no event and no chunk comes in one piece."""
    with serving(server_like_vllm(lambda asked: byte_by_byte(completion(asked)))) as server:
        assert bench(server, *SMALL, "--max-concurrency", "2") == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[1] == "============ Serving Benchmark Result ============"
    found = numbers(printed)
    assert found["Successful requests"] == 6
    assert found["Failed requests"] == 0
    assert found["Total input tokens"] == 6 * 20
    assert found["Total generated tokens"] == 6 * 5
    assert found["Maximum request concurrency"] == 2
    seconds = found["Benchmark duration (s)"]
    for label, total in (("Request", 6), ("Output token", 30), ("Total token", 150)):
        unit = "req/s" if label == "Request" else "tok/s"
        assert total / (seconds + 0.006) <= found[f"{label} throughput ({unit})"] <= total / max(seconds - 0.006, 1e-9)
    assert found["Peak output token throughput (tok/s)"] <= 30
    assert 1 <= found["Peak concurrent requests"] <= 2
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        assert {f"Mean {name} (ms)", f"Median {name} (ms)", f"P99 {name} (ms)"} <= set(found)
    assert found["Mean TTFT (ms)"] <= found["Mean E2EL (ms)"]
    assert "Successful requests:                     6         " in lines  # to the column, as vLLM prints it
    assert {len(line) for line in lines[2:] if re.match(r"\w.*: +[\d.]+ *$", line)} == {51}
    assert "---------------Time to First Token----------------" in lines


def test_prompts_have_the_length_that_was_asked_for_as_the_server_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Words that take three tokens are told from those that take one, and each prompt is still exact."""
    with serving(server_like_vllm(completion, long="o")) as server:
        assert bench(server, *SMALL, "--random-range-ratio", "0.5", "--seed", "3") == 0
        prompts = [asked.json["prompt"] for asked in asked_for_text(server)]
        lengths = [tokens_of(prompt, "o") for prompt in prompts]
        answers = [asked.json["max_tokens"] for asked in asked_for_text(server)]
    assert len(set(prompts)) == 6
    assert all(set(prompt.split()) <= ENGLISH for prompt in prompts)
    assert any("o" in word for prompt in prompts for word in prompt.split())
    assert min(lengths) >= 10
    assert max(lengths) <= 30
    assert len(set(lengths)) > 2
    assert set(answers) <= set(range(2, 9))
    assert f"{min(lengths)} to {max(lengths)} tokens as the server's /tokenize counts them" in capsys.readouterr().out


def test_a_seed_repeats_the_prompts_and_none_makes_new_ones() -> None:
    def prompts(*options: str) -> list[str]:
        with serving(server_like_vllm(completion)) as server:
            assert bench(server, *SMALL, "--max-concurrency", "1", *options) == 0
            return [asked.json["prompt"] for asked in asked_for_text(server)]

    assert prompts("--seed", "5") == prompts("--seed", "5")
    assert prompts() != prompts()


def test_what_does_not_fit_is_refused_before_the_load(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, "--random-input-len", "4000", "--random-output-len", "97") == 1
        assert "don't fit into this server's context of 4096" in capsys.readouterr().err
        assert bench(server, "--random-input-len", "1") == 1
        assert "prompts of 1 tokens can't be made" in capsys.readouterr().err
        assert not asked_for_text(server)


def test_a_server_without_tokenize_or_usage_is_measured_and_the_report_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tokens are counted by events then, without the closing event that carries none."""

    def answer(_: Asked) -> list[bytes]:
        return stream([*(event(text(" word")) for _ in range(4)), event(text("", "length")), DONE])

    with serving(server_like_vllm(answer, tokenize=False)) as server:
        assert bench(server, *SMALL) == 0
        assert {len(asked.json["prompt"].split()) for asked in asked_for_text(server)} == {20}
    printed = capsys.readouterr().out
    assert "about 20 tokens: the server has no /tokenize" in printed
    assert "6 of 6 answers came without usage" in printed
    assert numbers(printed)["Total generated tokens"] == 6 * 4


def test_requests_say_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    options = ["--temperature", "0.5", "--extra-body", '{"top_k": 3, "temperature": 0.7}', "--header", "X-A=b=c"]
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *SMALL, *options) == 0
        assert bench(server, *SMALL, "--api-key", "given", "--no-ignore-eos", "--model", "other") == 0
        first, last = asked_for_text(server)[0], asked_for_text(server)[-1]
        assert all(asked.headers["authorization"] == "Bearer from-the-environment" for asked in server.asked[:8])
    prompt = first.json["prompt"]
    assert first.json == {
        "model": "some/model",
        "prompt": prompt,
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.7,
        "top_k": 3,
    }
    assert first.headers["x-a"] == "b=c"
    assert first.headers["content-type"] == "application/json"
    assert last.json["model"] == "other"
    assert "ignore_eos" not in last.json
    assert last.headers["authorization"] == "Bearer given"


def test_chat_counts_content_and_not_the_opening_event(capsys: pytest.CaptureFixture[str]) -> None:
    """Two events with text between an opening and a closing one: one gap, so P0 and P100 of ITL are the same."""

    def answer(_: Asked) -> list[bytes]:
        opening = event(delta(role="assistant", content=""))
        content = [event(delta(content="one")), event(delta(reasoning_content="two")), event(delta("stop"))]
        return stream([opening, *content, event(usage(9, 2)), DONE])

    with serving(server_like_vllm(answer)) as server:
        options = ("--num-prompts", "1", "--random-input-len", "20", "--metric-percentiles", "0,100")
        assert bench(server, *options, "--backend", "openai-chat") == 0
        (asked,) = asked_for_text(server)
    assert asked.path == "/v1/chat/completions"
    (message,) = asked.json["messages"]
    assert message["role"] == "user"
    assert tokens_of(message["content"]) == 20 - 2  # the template takes two more
    assert asked.json["max_completion_tokens"] == 128
    found = numbers(capsys.readouterr().out)
    assert found["Total generated tokens"] == 2
    assert found["P0 ITL (ms)"] == found["P100 ITL (ms)"] == found["Mean TPOT (ms)"]


def orders_of_custom_prompts(file: Path) -> set[str]:
    """What comes first, over several seeds."""
    rows = read_trace(file, "prompts").rows
    return {_shuffled(rows, random.Random(seed))[0].texts[0] for seed in range(20)}


def test_custom_prompts_are_taken_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "first one", "id": 1}\n\n{"prompt": "zweite – ü"}\n', encoding="utf-8")
    assert orders_of_custom_prompts(file) == {"first one", "zweite – ü"}
    options = ("--dataset-name", "custom", "--dataset-path", str(file), "--num-prompts", "4")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *options, "--output-len", "3") == 0
        assert (
            sorted(asked.json["prompt"] for asked in asked_for_text(server)) == ["first one"] * 2 + ["zweite – ü"] * 2
        )
        assert all("ignore_eos" not in asked.json for asked in server.asked if asked.path != "/v1/models")
        assert "/tokenize" not in server.paths
        capsys.readouterr()
        file.write_text('{"prompt": "good"}\n{"text": "bad"}\n')
        assert bench(server, *options) == 1
        assert f'{file}:2: not an object with a text under "prompt"' in capsys.readouterr().err


def ways_to_fail() -> Iterator[list[bytes]]:
    """Twice six answers that fail, each in another way, and one that is good."""
    good = [event(text(" word")), event(text(" end", "stop")), event(usage(20, 2)), DONE]
    for _ in range(2):
        yield whole({"error": {"message": "no such   thing", "type": "x", "code": 400}}, "400 Bad Request")
        yield stream([event(text(" word")), event({"error": {"message": "the engine died"}}), DONE])
        yield [*stream(good)[:3], HANG_UP]
        yield stream(good[:1])
        yield whole(text("whole", "stop"))
        yield stream([b"data: {nonsense\n\n", *good])
        yield stream(good)


def test_failures_are_counted_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    ways = ways_to_fail()
    with serving(server_like_vllm(lambda _: next(ways))) as server:
        options = ("--num-prompts", "14", "--random-input-len", "20", "--max-concurrency", "1")
        assert bench(server, *options) == 1
    out, err = capsys.readouterr()
    found = numbers(out)
    assert (found["Successful requests"], found["Failed requests"]) == (2, 12)
    assert (found["Total input tokens"], found["Total generated tokens"]) == (40, 4)
    assert err.splitlines()[:5] == [
        "octavo bench: 2 failed: HTTP 400: no such thing",
        "octavo bench: 2 failed: in mid-stream: the engine died",
        "octavo bench: 2 failed: the connection ended in the middle of the answer",
        "octavo bench: 2 failed: the stream ended before the answer did (no finish_reason, no [DONE])",
        "octavo bench: 2 failed: the answer is no event stream but 'application/json': "
        + json.dumps(text("whole", "stop")),
    ]
    assert err.splitlines()[5] == "octavo bench: ... and for 1 more reason"


def test_an_answer_may_end_with_its_connection() -> None:
    def answer(_: Asked) -> list[bytes]:
        head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        return [head, event(text(" word")), event(text(" end", "stop")), event(usage(20, 2)), DONE, HANG_UP]

    with serving(server_like_vllm(answer)) as server:
        assert bench(server, *SMALL) == 0


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(server_like_vllm(completion)) as server:
        gone = server.url
    assert main(["bench", "--base-url", gone]) == 1
    error = capsys.readouterr().err
    assert error.startswith("octavo bench: no connection to 127.0.0.1:")
    assert error.count("\n") == 1
    assert main(["bench", "--base-url", "localhost:8000"]) == 1
    assert "is not a URL" in capsys.readouterr().err


def test_connections_are_kept_and_a_stale_one_is_replaced() -> None:
    """The server closes each connection after its second answer, without a word, as servers close idle ones."""
    served: dict[int, int] = {}

    def answer(asked: Asked) -> list[bytes]:
        served[asked.connection] = served.get(asked.connection, 0) + 1
        return completion(asked) if served[asked.connection] <= 2 else [HANG_UP]

    with serving(server_like_vllm(answer)) as server:
        assert bench(server, *SMALL, "--max-concurrency", "1") == 0
        assert len(asked_for_text(server)) == 6 + 2  # two were sent on a connection that closed, and again on a new one
        assert sorted(served.values()) == [2, 3, 3]


def test_concurrency_reaches_its_limit_and_never_exceeds_it(capsys: pytest.CaptureFixture[str]) -> None:
    """No answer goes on until three requests are there; a fourth would be counted."""
    at_once: list[int] = []
    under_way = 0
    barrier: asyncio.Barrier | None = None

    async def answer(asked: Asked) -> AsyncIterator[bytes]:
        nonlocal under_way, barrier
        barrier = barrier or asyncio.Barrier(3)
        under_way += 1
        at_once.append(under_way)
        await barrier.wait()
        under_way -= 1
        for piece in completion(asked):
            yield piece

    with serving(server_like_vllm(answer)) as server:
        assert bench(server, *SMALL, "--max-concurrency", "3") == 0
    assert max(at_once) == 3
    assert numbers(capsys.readouterr().out)["Peak concurrent requests"] == 3


def test_warm_ups_are_sent_and_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *SMALL, "--num-warmups", "2") == 0
        assert len({asked.json["prompt"] for asked in asked_for_text(server)}) == 8
    assert numbers(capsys.readouterr().out)["Successful requests"] == 6
    with serving(server_like_vllm(lambda _: whole({"detail": "no"}, "500 Internal Server Error"))) as server:
        assert bench(server, *SMALL, "--num-warmups", "2") == 1
        assert len(asked_for_text(server)) == 2
    assert "a warm-up request failed: HTTP 500: no" in capsys.readouterr().err


def test_ctrl_c_reports_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It comes when two answers are whole and the third is under way: the third is cut off and counts nowhere."""

    async def answer(asked: Asked) -> AsyncIterator[bytes]:
        if len(asked_for_text(server)) == 3:
            yield STREAM_HEAD + chunk(event(text(" word")))
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        for piece in completion(asked):
            yield piece

    with serving(server_like_vllm(answer)) as server:
        options = ("--max-concurrency", "1", "--save-result", "--result-dir", str(tmp_path))
        assert bench(server, *SMALL, *options) == 130
        assert asked_for_text(server)[2].hung_up.wait(10)
        assert len(asked_for_text(server)) == 3
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert (found["Successful requests"], found["Failed requests"]) == (2, 0)
    assert found["Unfinished requests (not counted)"] == 4
    assert found["Total generated tokens"] == 10
    assert "note: interrupted; 4 requests" in printed
    (saved,) = tmp_path.glob("*.json")
    assert json.loads(saved.read_text())["completed"] == 2


def test_results_are_saved_under_vllms_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 16}}
    options = ["--save-result", "--save-detailed", "--result-dir", str(tmp_path / "new"), "--result-filename", "r.json"]
    options += ["--goodput", "ttft:60000", "tpot:60000", "--cost-per-hour", "3", "--num-gpus", "2"]
    options += ["--metadata", "card=H100", "--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99.9"]
    with serving(server_like_vllm(lambda asked: completion(asked, **details))) as server:
        assert bench(server, *SMALL, *options, "--seed", "11", "--request-rate", "1000") == 0
    saved = json.loads((tmp_path / "new" / "r.json").read_text())
    known = {
        "endpoint_type": "openai", "backend": "openai", "model_id": "some/model", "num_prompts": 6, "card": "H100",
        "request_rate": 1000.0, "burstiness": 1.0, "max_concurrency": None, "completed": 6, "failed": 0, "seed": 11,
        "total_input_tokens": 120, "total_output_tokens": 30, "cached_input_tokens": 96, "num_gpus": 2,
        "input_lens": [20] * 6, "output_lens": [5] * 6, "errors": [""] * 6,
        "generated_texts": [" word" * 4 + " end"] * 6,
    }  # fmt: skip
    assert {key: saved[key] for key in known} == known
    assert saved["output_throughput"] == pytest.approx(30 / saved["duration"])
    assert saved["total_token_throughput"] == pytest.approx(150 / saved["duration"])
    assert saved["request_goodput"] == saved["request_throughput"] == pytest.approx(6 / saved["duration"])
    assert saved["usd_per_1m_output_tokens"] == pytest.approx(6 / (saved["output_throughput"] * 3600) * 1e6)
    assert saved["usd_per_1m_output_tokens_at_slo"] == saved["usd_per_1m_output_tokens"]
    ttfts = [1e3 * ttft for ttft in saved["ttfts"]]
    assert saved["mean_ttft_ms"] == pytest.approx(sum(ttfts) / 6)
    assert saved["p50_ttft_ms"] == saved["median_ttft_ms"]
    assert min(ttfts) <= saved["p50_ttft_ms"] <= saved["p99.9_ttft_ms"] <= max(ttfts)
    assert [len(gaps) for gaps in saved["itls"]] == [4] * 6
    assert not [key for key in saved if "tpot" in key or "itl_ms" in key]
    printed = capsys.readouterr().out
    found = numbers(printed)
    assert found["Cached input tokens"] == 96
    assert found["$ per 1M output tokens"] == pytest.approx(saved["usd_per_1m_output_tokens"], abs=1e-4)
    assert found["Request rate configured (RPS)"] == 1000
    assert "P99.9 TTFT (ms):" in printed
    assert "TPOT" not in printed


def test_an_slo_that_nothing_meets_has_no_price(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *SMALL, "--goodput", "ttft:0.000001", "--cost-per-hour", "3") == 0
    printed = capsys.readouterr().out
    assert numbers(printed)["Request goodput (req/s)"] == 0
    assert re.search(r"^\$ per 1M output tokens within the SLO: +n/a +$", printed, re.MULTILINE)
    assert numbers(printed)["$ per 1M output tokens"] > 0


# Self-signed for 127.0.0.1, from 2020 to 2120; the key protects nothing.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQghPFMPB/8YZxRGnnH
CBmHBWgHyIsFgWqMITTF3RWqavmhRANCAASSqID4mWdUXBvrumzGdPjmtelYb59u
Sb88DFJ4E/XD8PnEx3EerH8WcZlRe22f08DJlkSk2RvlbcN9JWpIgyo/
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBWzCCAQKgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAkxMjcuMC4w
LjEwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CTEyNy4wLjAuMTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJKogPiZZ1RcG+u6
bMZ0+Oa16Vhvn25JvzwMUngT9cPw+cTHcR6sfxZxmVF7bZ/TwMmWRKTZG+Vtw30l
akiDKj+jQzBBMA8GA1UdEQQIMAaHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAdBgNV
HQ4EFgQUr5QgQCHoHQiMdH6ta63f1BbPj6AwCgYIKoZIzj0EAwIDRwAwRAIgMZuv
WrvMaToOLQTzM+JwBXnOKNpYYVKju9dnuEtt2wUCIFkrN+x/f3n2kYkygWOoXaUb
OJVgI4x8sj7ViRsHRucn
-----END CERTIFICATE-----
"""


def test_https_is_spoken_and_a_certificate_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    certificate.write_text(CERTIFICATE)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    with serving(server_like_vllm(lambda asked: byte_by_byte(completion(asked))), tls) as server:
        assert server.url.startswith("https:")
        assert bench(server, *SMALL) == 1
        assert "certificate verify failed" in capsys.readouterr().err
        assert bench(server, *SMALL, "--insecure") == 0
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert bench(server, *SMALL) == 0
    assert numbers(capsys.readouterr().out)["Total generated tokens"] == 30


def test_a_whole_answer_may_come_in_one_piece() -> None:
    with serving(server_like_vllm(lambda asked: [b"".join(completion(asked))])) as server:
        assert bench(server, *SMALL) == 0


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_octavo_serves_octavo_bench(
    octavo_server: OwnServer, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts are of the exact length as the real tokenizer counts them, and nothing is found in the prefix cache."""
    options = ["--api-key", octavo_server.api_key, "--backend", backend, "--num-prompts", "6", "--max-concurrency", "3"]
    options += ["--random-input-len", "48", "--random-output-len", "6", "--temperature", "0", "--num-warmups", "1"]
    options += ["--save-result", "--save-detailed", "--result-dir", str(tmp_path)]
    assert main(["bench", "--base-url", octavo_server.url, *options]) == 0
    found = numbers(capsys.readouterr().out)
    assert found["Total input tokens"] == 6 * 48
    assert found["Total generated tokens"] == 6 * 6
    assert found["Peak concurrent requests"] <= 3
    (saved,) = tmp_path.glob(f"{backend}-infqps-concurrency3-tiny-*.json")
    detailed = json.loads(saved.read_text())
    assert detailed["input_lens"] == [48] * 6
    assert all(len(gaps) < 6 for gaps in detailed["itls"])
    assert detailed["cached_input_tokens"] < 6 * 16 * (2 if backend == "openai-chat" else 1)


@pytest.mark.parametrize("chat", [False, True])
def test_a_real_server_counts_the_tokens_that_workloads_claim(octavo_server: OwnServer, chat: bool) -> None:
    """Conversations through a real tokenizer and chat template, counted by the server and by a local tokenizer."""

    async def run() -> None:
        client = Client(octavo_server.url, {"Authorization": f"Bearer {octavo_server.api_key}"})
        model = await first_model(client)
        vocabulary = await measure_vocabulary(client, model, chat=chat, turns=True)
        local = await local_vocabulary(TINY, chat=chat)
        assert (local.base, local.turn, local.words) == (vocabulary.base, vocabulary.turn, vocabulary.words)
        prompts = make_requests(WORKLOADS["chat"].scaled(0.2), 8, random.Random(2), vocabulary)
        prompts = [replace(prompt, output_len=2, think=0.0) for prompt in prompts]
        assert any(prompt.follows for prompt in prompts)
        target = Target(model, chat=chat, extra_body={"temperature": 0})
        result = await run_point(client, target, prompts, Point(concurrency=2), rng=random.Random(0))
        client.close()
        assert [record.error for record in result.records] == [None] * 8
        assert [record.usage and record.usage.prompt_tokens for record in result.records] == [
            prompt.num_tokens for prompt in prompts
        ]
        assert [record.output_len for record in result.records] == [2] * 8

    asyncio.run(run())
