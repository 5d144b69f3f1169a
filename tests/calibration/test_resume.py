"""A run with calibration that is killed, at any moment, and resumed: the same bytes as an uninterrupted one's."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked_commands import forked_commands

from octavo.calibration.workspace import read_manifest

pytestmark = pytest.mark.long

PATIENCE = 600.0  # seconds; only a hang takes as long
OPTIONS = (
    *("--scheme", "W4A16", "--group-size", "32", "--kv-cache-scheme", "fp8/head"),
    *("--num-calibration-samples", "6", "--max-seq-length", "64", "--no-eval", "--max-shard-size", "300KB"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = "The quick brown fox jumps over the lazy dog while forty two files are opened, read and closed again. "
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"{i}. {words * (i % 5 + 1)}" for i in range(200)))
    return path


@pytest.fixture
def model(tmp_path: Path, fixtures: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    return copy


def command(model: Path, out: Path, text: Path, algorithm: str, *more: str) -> list[str]:
    arguments = [str(model), "-o", str(out), "--dataset", str(text), "--algorithm", algorithm, *OPTIONS, *more]
    return [sys.executable, "-m", "octavo", "quantize", *arguments]


def resume(*arguments: Any) -> None:
    """To the end, in a process that is forked."""
    done = forked_commands().run(*command(*arguments, "--resume")[3:], seconds=PATIENCE)
    assert done.code == 0, done.stderr


def contents(directory: Path) -> dict[str, str]:
    """Every file's hash; the report's seconds are its own."""
    hashes = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        if path.name == "quantization_report.json":
            data = json.dumps(json.loads(data) | {"seconds": None}).encode()
        if path.suffix != ".html":  # shows the seconds too
            hashes[path.name] = hashlib.sha256(data).hexdigest()
    return hashes


def units_of(partial: Path) -> int:
    return len(read_manifest(partial)["units"])


def duration_of(arguments: list[str]) -> tuple[float, float]:
    """Seconds of a run until its first unit is written, and until its end."""
    begin = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    out = Path(arguments[arguments.index("-o") + 1])
    while process.poll() is None and units_of(out.with_name(f".{out.name}.partial")) == 0:
        time.sleep(0.01)
    begun = time.monotonic() - begin
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return begun, time.monotonic() - begin


def kill_when(process: subprocess.Popen[bytes], partial: Path, units: int, after: float) -> bool:
    """SIGKILL so many seconds after so many units are written; whether it still ran."""
    while process.poll() is None and units_of(partial) < units:
        time.sleep(0.01)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def kill_test(model: Path, text: Path, directory: Path, algorithm: str, kills: int, seed: int) -> list[int]:
    """Kill a run and its successors; returns how many units each left. The last ends by itself, the same.

    A kill comes at any moment of a run, or within the time of the units that follow the next one or two.
    """
    begun, duration = duration_of(command(model, directory / "whole" / "out", text, algorithm))  # the card has its name
    rng, left = random.Random(seed), []
    out = directory / "out"
    partial = directory / ".out.partial"
    while len(left) < kills:
        more = rng.randrange(3)
        after = rng.uniform(0, (duration - begun) / 2 if more else duration)
        process = subprocess.Popen(
            command(model, out, text, algorithm, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        was_killed = kill_when(process, partial, units_of(partial) + more, after)
        assert process.stderr is not None
        with process.stderr as errors:
            said = errors.read().decode()
        assert was_killed or process.returncode == 0, said
        left += [units_of(partial)] if was_killed else []
        assert not (partial / "config.json").exists() or not out.exists()
        assert not list(partial.glob("*.safetensors")) or (partial / "config.json").exists()
        if out.exists() and rng.random() < 0.5:
            shutil.rmtree(out)
    resume(model, out, text, algorithm)
    assert contents(out) == contents(directory / "whole" / "out")
    assert sorted(p.name for p in directory.iterdir()) == ["model", "out", "whole"]
    return left


def test_a_killed_run_is_resumed(model: Path, text: Path, tmp_path: Path) -> None:
    """Of the algorithm that keeps most between two blocks: hidden states of the original as well."""
    kill_test(model, text, tmp_path, "tune", kills=2, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["gptq", "tune"])
def test_twenty_kills(model: Path, text: Path, tmp_path: Path, algorithm: str) -> None:
    left = kill_test(model, text, tmp_path, algorithm, kills=20, seed=2)
    assert len(set(left)) > 1
