"""The other commands of `octavo bench`: throughput, latency, sweep and startup."""

from __future__ import annotations

import csv
import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench_server import asked_for_text, completion, server_like_vllm
from scripted_server import ScriptedServer, serving, whole

from octavo.cli import main

SMALL = ("--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "3")


def command(server: ScriptedServer, name: str, *options: str) -> int:
    return main(["bench", name, "--base-url", server.url, *options])


def test_serve_is_the_command_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(server_like_vllm(completion)) as server:
        assert command(server, "serve", *SMALL) == 0
    assert "Successful requests:                     6" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "throughput, latency, startup, sweep, compare" in " ".join(capsys.readouterr().out.split())


def test_throughput_sends_all_at_once_and_prints_vllms_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.json"
    with serving(server_like_vllm(completion)) as server:
        assert command(server, "throughput", *SMALL, "--output-json", str(file)) == 0
        out = capsys.readouterr().out
        for flag in ("--request-rate=3", "--save-result", "--goodput=ttft:5", "--plot"):
            with pytest.raises(SystemExit):  # it would change nothing
                command(server, "throughput", *SMALL, flag)
            assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
        missing = str(tmp_path / "missing" / "t.json")
        assert command(server, "throughput", *SMALL, "--output-json", missing) == 1
        assert "No such file" in capsys.readouterr().err
    assert re.search(
        r"^Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, [\d.]+ output tokens/s$", out, re.MULTILINE
    )
    assert "Total num prompt tokens:  120\nTotal num output tokens:  18" in out
    content = json.loads(file.read_text())
    assert (content["num_requests"], content["total_num_tokens"]) == (6, 138)
    assert content["tokens_per_second"] == pytest.approx(138 / content["elapsed_time"])


def test_latency_is_of_batches_of_new_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "l.json"
    batches = ("--batch-size", "3", "--num-iters", "4", "--num-iters-warmup", "2", "--output-len", "2")
    with serving(server_like_vllm(completion)) as server:
        assert command(server, "latency", *batches, "--output-json", str(file)) == 0
        prompts = [one.json["prompt"] for one in asked_for_text(server)]
    assert len(prompts) == len(set(prompts)) == 18
    content = json.loads(file.read_text())
    assert len(content["latencies"]) == 4
    assert content["avg_latency"] == pytest.approx(sum(content["latencies"]) / 4)
    assert min(content["latencies"]) <= content["percentiles"]["50"] <= max(content["latencies"])
    printed = capsys.readouterr().out
    assert "Not measured, as warm-up: the first 2 batches." in printed
    assert f"50% percentile latency: {content['percentiles']['50']} seconds" in printed
    with serving(server_like_vllm(completion)) as server:
        once = ("--batch-size", "1", "--num-iters", "1", "--num-iters-warmup", "0", "--output-len", "2")
        assert command(server, "latency", *once, "--output-json", str(tmp_path / "missing" / "l.json")) == 1
        assert "No such file" in capsys.readouterr().err
    with serving(server_like_vllm(lambda _: whole({"detail": "no"}, "500 Internal Server Error"))) as server:
        assert command(server, "latency", *batches) == 1
    assert "HTTP 500: no" in capsys.readouterr().err


def test_a_sweep_measures_each_combination_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ("--sweep", "max_concurrency=1,2", "--sweep", "random-output-len=2,3", "--num-runs", "3")
    options = ("--num-prompts", "2", "--random-input-len", "20", "--seed", "1", "-o", str(tmp_path))
    with serving(server_like_vllm(completion)) as server:
        assert command(server, "sweep", *options, *axes, "--dry-run") == 0
        assert not list(tmp_path.iterdir())
        assert capsys.readouterr().out.count("run 1 of 3") == 4
        assert command(server, "sweep", *options, *axes) == 0
        assert len(asked_for_text(server)) == 4 * 3 * 2
        (tmp_path / "max-concurrency=1-random-output-len=2" / "run=1.json").unlink()
        capsys.readouterr()
        assert command(server, "sweep", *options, *axes) == 0
        assert capsys.readouterr().out.count("is there already, and is not measured again") == 4 * 3 - 1
        assert len(asked_for_text(server)) == 4 * 3 * 2 + 2
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["total_output_tokens"] for row in rows if row["random-output-len"] == "3"} == {"6"}
    assert {row["seed"] for row in rows} == {"1", "2", "3"}
    capsys.readouterr()
    both = [str(tmp_path / f"max-concurrency={n}-random-output-len=2" / "runs.jsonl") for n in (1, 2)]
    assert main(["bench", "compare", *both]) == 0
    printed = capsys.readouterr().out
    assert "intervals of 95 %: 3 and 3 runs" in printed
    assert "note: max_concurrency differs: 1 and 2" in printed


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_whose_file_was_cut_off_is_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--num-prompts", "2", "--random-input-len", "20", "--num-runs", "1", "-o", str(tmp_path))
    with serving(server_like_vllm(completion)) as server:
        with files_of_at_most(100):
            assert command(server, "sweep", *options) == 1
        assert "File too large" in capsys.readouterr().err
        assert command(server, "sweep", *options) == 0
        assert len(asked_for_text(server)) == 2 * 2


def test_a_sweep_reads_vllms_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "params.json"
    file.write_text('[{"num_prompts": 2, "random_output_len": 2}, {"num_prompts": 3, "random_output_len": 2}]')
    options = ("--random-input-len", "20", "-o", str(tmp_path / "out"), "--num-runs", "1")
    with serving(server_like_vllm(completion)) as server:
        assert command(server, "sweep", *options, "--bench-params", str(file)) == 0
        assert len(asked_for_text(server)) == 5
        file.write_text("{}")
        assert command(server, "sweep", *options, "--bench-params", str(file)) == 1
        assert "is not a list of objects" in capsys.readouterr().err
        file.write_text("{nonsense")
        assert command(server, "sweep", *options, "--bench-params", str(file)) == 1
        assert f"{file} is not JSON" in capsys.readouterr().err
        assert command(server, "sweep", *options, "--sweep", "num_runs=1,2") == 1
        assert "--num-runs is the sweep's own" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            command(server, "sweep", *options, "--plot")


def test_flags_of_the_server_are_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "startup", "m", "--serve-flags", "--dtype 'int8"])
    assert "No closing quotation" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "throughput"])
def test_a_file_that_is_not_there_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "none.jsonl"
    assert main(["bench", command, "--dataset-name", "custom", "--dataset-path", str(file), "--model", "x"]) == 1
    assert capsys.readouterr().err.endswith(f": {file}: No such file or directory\n")


def test_a_model_that_writes_nothing_is_not_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert main(["bench", "startup", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"octavo bench startup: {tmp_path}: it writes no answers to prompts but makes vectors")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_server_is_started_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One warm start of the tiny model, which may compile for a minute; by hand before a release."""
    tiny = str(Path(__file__).resolve().parents[1] / "fixtures/tiny")
    file = tmp_path / "s.json"
    starts = ("--num-iters-cold", "0", "--num-iters-warmup", "0", "--num-iters-warm", "1", "--output-json", str(file))
    assert main(["bench", "startup", tiny, "--serve-flags", "--dtype float32", *starts]) == 0
    content = json.loads(file.read_text())
    assert 0 < content["avg_warm_startup_time"] < content["avg_warm_first_token_time"]
    assert "WARM STARTUP:\nAvg startup time: " in capsys.readouterr().out
    assert main(["bench", "startup", str(tmp_path / "missing"), *starts]) == 1
    assert "no such directory" in capsys.readouterr().err
