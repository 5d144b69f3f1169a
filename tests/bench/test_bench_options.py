"""What the options of `octavo bench` put into requests, into the load and into files."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from bench_server import asked_for_text, bench, completion, numbers, server_like_vllm, tokens_of
from scripted_server import DONE, Asked, delta, event, serving, stream, text, usage, whole

from octavo.cli import main

SMALL = ("--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "3")


def test_a_workload_is_asked_with_its_turns_and_the_report_names_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--workload", "chat", "--length-scale", "0.1", "--num-prompts", "12", "--seed", "4")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *options, "--backend", "vllm-chat", "--max-concurrency", "3") == 0
        asked = asked_for_text(server)
    turns = Counter(len(one.json["messages"]) for one in asked)
    assert sum(turns.values()) == 12
    assert set(turns) > {1}
    assert all(one.json["ignore_eos"] for one in asked)
    printed = capsys.readouterr().out
    assert "workload chat of 0.1 times its lengths" in printed
    assert "LMSYS-Chat-1M" in printed
    assert "as the server's /tokenize counts them" in printed


def test_a_local_tokenizer_counts_where_the_server_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Path(__file__).resolve().parents[1] / "fixtures/tiny"
    with serving(server_like_vllm(completion, tokenize=False)) as server:
        assert bench(server, *SMALL, "--tokenizer", str(tiny)) == 0
        assert "/tokenize" not in server.paths
    assert f"20 tokens as the tokenizer of {tiny} counts them" in capsys.readouterr().out


def test_prefixes_are_shared_as_often_as_was_asked_for() -> None:
    lengths = ("--prefix-repetition-prefix-len", "30", "--prefix-repetition-suffix-len", "10", "--output-len", "2")
    options = ("--dataset-name", "prefix_repetition", *lengths, "--prefix-repetition-num-prefixes", "3")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *options, "--num-prompts", "9") == 0
        prompts = [one.json["prompt"] for one in asked_for_text(server)]
        assert bench(server, *SMALL, "--random-prefix-len", "30") == 0
        one_prefix = [one.json["prompt"] for one in asked_for_text(server)[9:]]
    assert {tokens_of(prompt) for prompt in prompts} == {40}
    prefixes = Counter(" ".join(prompt.split()[:29]) for prompt in prompts)  # and the beginning token
    assert sorted(prefixes.values()) == [3, 3, 3]
    assert len(set(prompts)) == 9
    assert {tokens_of(prompt) for prompt in one_prefix} == {50}
    assert len({" ".join(prompt.split()[:29]) for prompt in one_prefix}) == 1


def test_requests_carry_the_sampling_and_the_adapters() -> None:
    sampling = ("--top-p", "0.9", "--top-k", "5", "--min-p", "0.1", "--frequency-penalty", "0.2")
    more = ("--presence-penalty", "0.3", "--repetition-penalty", "1.1", "--logprobs", "2")
    with serving(server_like_vllm(completion)) as server:
        assert (
            bench(server, *SMALL, *sampling, *more, "--lora-modules", "a", "b", "--lora-assignment", "round-robin") == 0
        )
        asked = [one.json for one in asked_for_text(server)]
        chat = ("--backend", "openai-chat", "--logprobs", "2", "--chat-template-kwargs", '{"enable_thinking": false}')
        assert bench(server, *SMALL, *chat) == 0
        said = asked_for_text(server)[-1].json
    wanted = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "frequency_penalty": 0.2, "presence_penalty": 0.3}
    wanted |= {"repetition_penalty": 1.1, "logprobs": 2}
    assert all({key: body[key] for key in wanted} == wanted for body in asked)
    assert Counter(body["model"] for body in asked) == {"a": 3, "b": 3}
    assert (said["logprobs"], said["top_logprobs"]) == (True, 2)
    assert said["chat_template_kwargs"] == {"enable_thinking": False}


def test_requests_have_ids_and_the_load_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    def script(asked: Asked) -> list[bytes]:
        if asked.path == "/start_profile":  # vLLM answers so
            return [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]
        if asked.path == "/stop_profile":
            return whole({"detail": "no space left"}, "500 Internal Server Error")
        return completion(asked)

    names = ("--served-model-name", "name", "--model", "some/path")
    with serving(server_like_vllm(script)) as server:
        assert bench(server, *SMALL, "--profile", "--request-id-prefix", "run-7-", *names) == 0
        asked = [one for one in server.asked if one.path != "/tokenize"]
    assert "POST /stop_profile: HTTP 500: no space left" in capsys.readouterr().err
    assert [asked[0].path, asked[-1].path] == ["/start_profile", "/stop_profile"]
    assert {one.headers["x-request-id"] for one in asked[1:-1]} == {f"run-7-{i}" for i in range(6)}
    assert {one.json["model"] for one in asked[1:-1]} == {"name"}
    with serving(server_like_vllm(lambda _: whole({"detail": "Not Found"}, "404 Not Found"))) as server:
        assert bench(server, *SMALL, "--profile", "--model", "m") == 1
    assert "POST /start_profile: HTTP 404: Not Found" in capsys.readouterr().err


def test_a_rate_over_a_time_makes_its_own_number_of_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--request-rate", "200", "--max-seconds", "0.15", "--warmup-seconds", "0.05", "--num-warmups", "2")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *SMALL, *load, "--seed", "1") == 0
        sent = len(asked_for_text(server))
    printed = capsys.readouterr().out
    rule = "Not measured, as warm-up: 2 requests before the load, and requests that begin within its first 0.05 s."
    assert rule in printed
    assert 6 < numbers(printed)["Successful requests"] < sent - 2
    assert numbers(printed)["Steady output throughput (tok/s)"] > 0
    assert numbers(printed)["Successful requests"] < 60  # 30 on average
    assert main(["bench", "--base-url", "http://127.0.0.1:1", "--model", "m", "--max-seconds", "1"]) == 1
    assert "--max-seconds goes with --request-rate or --max-concurrency" in capsys.readouterr().err


def test_a_load_of_which_nothing_is_measured_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n')
    short = ("--dataset-name", "custom", "--dataset-path", str(file), "--no-oversample")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *SMALL, "--warmup-seconds", "60") == 1
        assert "all 6 requests began within --warmup-seconds 60" in capsys.readouterr().err
        assert bench(server, *SMALL, "--request-rate", "0.001", "--max-seconds", "0.05") == 1
        assert "no request came within --max-seconds 0.05" in capsys.readouterr().err
        assert bench(server, *short, "--request-rate", "100", "--max-seconds", "1") == 1
        assert "has 1 requests, and --request-rate 100 may take 190" in capsys.readouterr().err
        sent = len(asked_for_text(server))
        assert bench(server, *short, "--num-prompts", "5") == 0  # the one that there is
        assert len(asked_for_text(server)) == sent + 1


def test_a_closed_load_that_runs_out_of_prompts_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *SMALL, "--max-concurrency", "2", "--max-seconds", "60") == 0
    assert "note: all 6 prompts were answered before --max-seconds 60 was over" in capsys.readouterr().err


async def never(_: Asked) -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


def test_a_server_that_never_answers_is_not_waited_for_longer_than_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(never) as server:
        assert bench(server, *SMALL, "--ready-check-timeout-sec", "0.1") == 1
    assert "GET /v1/models: no answer within 0.1 s" in capsys.readouterr().err


ODD_COUNTS = ([1, 2], {"count": 2, "max_model_len": "long"}, {"count": -5}, {"tokens": []})


def test_a_tokenize_of_another_kind_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """TGI's is a list, llama.cpp's has no count."""
    for odd in ODD_COUNTS:

        def script(asked: Asked, odd: object = odd) -> list[bytes]:
            return whole(odd) if asked.path == "/tokenize" else completion(asked)

        with serving(script) as server:
            assert bench(server, *SMALL, "--model", "m") == 0
        assert "about 20 tokens: the server has no /tokenize" in capsys.readouterr().out


def odd_answers() -> Iterator[list[bytes]]:
    """One that comes after a hint, one that is elsewhere, and one whose counts can't be."""
    good = [event(text(" word")), event(text(" end", "stop")), DONE]
    yield [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", *stream(good)]
    yield [b"HTTP/1.1 307 Temporary Redirect\r\nLocation: https://elsewhere/v1\r\nContent-Length: 0\r\n\r\n"]
    yield stream([*good[:-1], event(usage(-3, 2)), DONE])


def test_odd_answers_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    answers = odd_answers()
    with serving(server_like_vllm(lambda _: next(answers))) as server:
        assert bench(server, "--num-prompts", "3", "--random-input-len", "20", "--max-concurrency", "1") == 1
    out, err = capsys.readouterr()
    assert (numbers(out)["Successful requests"], numbers(out)["Total generated tokens"]) == (1, 2)
    assert "1 failed: HTTP 307: the server redirects to https://elsewhere/v1; --base-url must be" in err
    assert (
        "1 failed: an event of the stream is not as OpenAI's: Expected `int` >= 0 - at `$.usage.prompt_tokens`" in err
    )


def test_a_role_in_every_event_hides_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    """The second token has no text yet: half of a letter, say."""
    events = [delta(role="assistant", content=piece) for piece in ("", "one", "", "two")]
    answer = stream([*(event(one) for one in events), event(delta("stop")), DONE])
    with serving(server_like_vllm(lambda _: answer)) as server:
        options = ("--num-prompts", "1", "--random-input-len", "20", "--backend", "openai-chat")
        assert bench(server, *options) == 0
    assert numbers(capsys.readouterr().out)["Total generated tokens"] == 4


def test_a_ramp_is_named_in_the_report_and_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ramp = ("--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "50", "--ramp-up-end-rps", "400")
    with serving(server_like_vllm(completion)) as server:
        assert (
            bench(server, *SMALL, *ramp, "--burstiness", "inf", "--append-result", "--result-dir", str(tmp_path)) == 0
        )
    (saved,) = tmp_path.glob("openai-ramp-up-exponential-50.0qps-400.0qps-model-*.json")
    content = json.loads(saved.read_text())
    assert content["ramp_up_end_rps"] == 400
    assert content["burstiness"] == "inf"  # JSON has no infinity
    assert numbers(capsys.readouterr().out)["Ramp-up to (RPS)"] == 400


def test_results_are_appended_as_lines(tmp_path: Path) -> None:
    options = ("--append-result", "--result-dir", str(tmp_path), "--result-filename", "all.jsonl")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *SMALL, *options, "--seed", "1") == 0
        assert bench(server, *SMALL, *options, "--seed", "2") == 0
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [1, 2]


def test_a_server_that_is_starting_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    ready = threading.Event()
    asked_early = threading.Event()

    def starting(asked: Asked) -> list[bytes]:
        if not ready.is_set():
            asked_early.set()
            return whole({"error": {"message": "loading"}}, "503 Service Unavailable")
        return list(server_like_vllm(completion)(asked))  # type: ignore[arg-type]

    def become_ready() -> None:
        asked_early.wait(10)
        ready.set()

    with serving(starting) as server:
        assert bench(server, *SMALL) == 1
        assert "HTTP 503: loading" in capsys.readouterr().err
        asked_early.clear()
        waiter = threading.Thread(target=become_ready)
        waiter.start()
        assert bench(server, *SMALL, "--ready-check-timeout-sec", "30") == 0
        waiter.join()


def test_a_late_client_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """The server takes 30 ms for each request, one at a time, that are meant for every millisecond."""

    def slow(asked: Asked) -> list[bytes]:
        time.sleep(0.03)
        return completion(asked)

    with serving(server_like_vllm(slow)) as server:
        load = ("--request-rate", "1000", "--max-concurrency", "1")
        assert bench(server, *SMALL, *load) == 0
    assert "after the time that they were meant for, from which latencies count" in capsys.readouterr().out


def test_embeddings_are_measured_by_their_end(capsys: pytest.CaptureFixture[str]) -> None:
    """The last of three answers is none."""
    answers = 0

    def answer(asked: Asked) -> list[bytes]:
        nonlocal answers
        answers += 1
        if answers == 3:
            return whole({"nothing": []})
        usage_ = {"prompt_tokens": tokens_of(asked.json["input"]), "total_tokens": 20}
        return whole({"object": "list", "data": [{"embedding": [0.1, 0.2], "index": 0}], "usage": usage_})

    options = ("--backend", "openai-embeddings", "--num-prompts", "3", "--random-input-len", "20")
    with serving(server_like_vllm(answer)) as server:
        assert bench(server, *options, "--max-concurrency", "1") == 1
        assert server.paths.count("/v1/embeddings") == 3
    out, err = capsys.readouterr()
    found = numbers(out)
    assert (found["Successful requests"], found["Total input tokens"], found["Total generated tokens"]) == (2, 40, 0)
    assert found["Mean E2EL (ms)"] > 0
    assert "TTFT" not in out
    assert "the answer is not an object with data" in err
