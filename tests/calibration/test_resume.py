"""A run with calibration that is killed, at any moment, and resumed: the same bytes as an uninterrupted one's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked_commands import ForkedProcess, forked_commands
from quantize_runs import write_text
from safetensors.torch import load_file, save_file

from octavo.calibration.workspace import read_manifest

pytestmark = pytest.mark.long

PATIENCE = 600.0  # seconds; only a hang takes as long
OPTIONS = (
    *("--scheme", "W4A16", "--group-size", "32", "--kv-cache-scheme", "fp8/head"),
    *("--num-calibration-samples", "6", "--self-generated-samples", "0", "--max-seq-length", "64", "--no-eval"),
    *("--max-shard-size", "300KB"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def model(tmp_path: Path, fixtures: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    return copy


def arguments(model: Path, out: Path, text: Path, algorithm: str, *more: str) -> list[str]:
    return ["quantize", str(model), "-o", str(out), "--dataset", str(text), "--algorithm", algorithm, *OPTIONS, *more]


def run(*command: str) -> float:
    """To the end; returns its seconds. All runs are forked off a process that has imported everything."""
    done = forked_commands().run(*command, seconds=PATIENCE)
    assert done.code == 0, done.stderr
    return done.seconds


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


def kill_after(process: ForkedProcess, partial: Path, more: int, share: float, duration: float) -> bool:
    """SIGKILL once it has finished so many units, and a share of the last one's time, or of a run's with none.

    Returns whether that left an unfinished run.
    """
    begin = time.monotonic()
    found = before = units_of(partial)
    while process.poll() is None and (now := units_of(partial)) < found + more:
        if now > before:
            begin, before = time.monotonic(), now
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(share * (time.monotonic() - begin if more else duration))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and partial.is_dir()


def kill_test(
    model: Path, text: Path, directory: Path, algorithm: str, kills: int, seed: int, units: Sequence[int]
) -> list[tuple[int, int]]:
    """Kill a run and its successors; the last ends by itself, with the same bytes.

    units: how many of them a run may finish before the time of its kill begins. Returns how many each found and left.
    """
    duration = run(*arguments(model, directory / "whole" / "out", text, algorithm))  # the card has its name
    rng, left = random.Random(seed), []
    out = directory / "out"
    partial = directory / ".out.partial"
    while len(left) < kills:
        found = units_of(partial)
        with forked_commands().start(arguments(model, out, text, algorithm, "--resume")) as process:
            was_killed = kill_after(process, partial, rng.choice(units), rng.random(), duration)
            assert process.stdout is not None
            assert process.returncode in (0, -signal.SIGKILL), process.stdout.read()
        left += [(found, units_of(partial))] if was_killed else []
        assert not (partial / "config.json").exists() or not out.exists()
        assert not list(partial.glob("*.safetensors")) or (partial / "config.json").exists()
        if out.exists() and rng.random() < 0.5:
            shutil.rmtree(out)
    run(*arguments(model, out, text, algorithm, "--resume"))
    assert contents(out) == contents(directory / "whole" / "out")
    assert sorted(p.name for p in directory.iterdir()) == ["model", "out", "whole"]
    return left


def deepen(model: Path, blocks: int) -> None:
    """Repeat the model's blocks until they are so many."""
    config = json.loads((model / "config.json").read_text())
    own, prefix = config["num_hidden_layers"], "model.layers."
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.startswith(prefix)]:
        index, _, rest = name.removeprefix(prefix).partition(".")
        tensors |= {f"{prefix}{i}.{rest}": tensors[name].clone() for i in range(int(index) + own, blocks, own)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))


def test_a_killed_run_is_resumed(model: Path, text: Path, tmp_path: Path) -> None:
    """Of the algorithm that keeps most between two blocks: hidden states of the original as well."""
    kill_test(model, text, tmp_path, "tune", kills=2, seed=7, units=range(3))


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "blocks", "units"), [("gptq", 24, 2), ("tune", 4, 1)])
def test_twenty_kills(model: Path, text: Path, tmp_path: Path, algorithm: str, blocks: int, units: int) -> None:
    """Each within a block, in a run that has finished a unit: twenty runs go on with what one before has left.

    Tuning takes far longer for a block than GPTQ, so that its model has fewer, and is begun anew more often.
    """
    deepen(model, blocks)
    left = kill_test(model, text, tmp_path, algorithm, kills=20, seed=2, units=[units])
    print(f"{algorithm}: units before and after each kill {left}")
    assert all(after > found for found, after in left)
