"""Processes that share a calibration's samples: the same checkpoint as by one, whoever of them is killed meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from calibrated import calibration
from quantize_runs import digest, tuning, write_text
from safetensors.torch import load_file
from torch import Tensor

import octavo
from octavo.calibration import block, tune
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.algorithms.learned_rounding import LearnedRounding
from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import follow_model, quantize_model
from octavo.calibration.recipe import Recipe, RecipeError, parse_scheme
from octavo.calibration.team import ALONE, Team, TeamError, check_alike, largest, rows_of_all, total, total_of_counts
from octavo.calibration.tune import BlockWeights, Tuned
from octavo.calibration.workspace import MANIFEST, Workspace, partial_of, read_manifest
from octavo.jobs.calibration_member import Member
from octavo.quant.qparams import quantize_weight
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.parallel.group import Shared

WORKER = b"octavo.jobs.calibration_worker"
PATIENCE = 300.0  # seconds; only a hang takes as long
T = TypeVar("T")
TEXT = [torch.arange(5 + i, 133 + i) for i in range(48)]  # three batches


def together(size: int, work: Callable[[Team], T]) -> list[T]:
    """The results of all members of a team, each in a thread."""
    memory = os.memfd_create("octavo-test")
    try:
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(lambda rank: work(Member(Shared(memory, rank, size))), range(size)))
    finally:
        os.close(memory)


def quantized(model: Path, out: Path, workers: int = 1, **how: Any) -> dict[str, Tensor]:
    given = {"data": TEXT, "evaluate": False, "algorithm": "rtn", "scheme": "W4A16@32"} | how
    octavo.quantize(model, out, calibration_workers=workers, **given)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("size", [2, 3])
def test_statistics_are_those_of_all_tokens(size: int) -> None:
    """Against float64, and the same bits for each member, also where one has seen nothing."""
    torch.manual_seed(size)
    parts = [torch.randn(300 * i, 96) for i in range(size)]
    x = torch.cat(parts).double()

    def work(team: Team) -> InputStats:
        collector = StatsCollector(96, torch.device("cpu"), num_rows=64)
        if len(parts[team.rank]):
            collector.add(parts[team.rank])
        return collector.result(team)

    found = together(size, work)
    for stats in found:
        assert stats.num_tokens == len(x)
        torch.testing.assert_close(stats.moments.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(stats.absmax.double(), x.abs().amax(0))
        torch.testing.assert_close(stats.absmean.double(), x.abs().mean(0), rtol=1e-5, atol=0)
        for name in ("moments", "absmax", "absmean", "rows"):
            assert torch.equal(getattr(stats, name), getattr(found[0], name))
        assert 16 <= len(stats.rows) <= 64
        assert all((row.double() == x).all(1).any() for row in stats.rows)


def test_what_members_have_becomes_what_all_have() -> None:
    counts = torch.tensor([3, 2**31, 70_000])
    codes = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)

    def work(team: Team) -> tuple[Tensor, ...]:
        own = codes[:1] if team.rank == 0 else codes[1:]
        each = torch.tensor([1.0 + team.rank, -1.0])
        return total_of_counts(team, counts), rows_of_all(team, own), total(team, each), largest(team, each)

    for found in together(2, work):
        assert found[0].tolist() == [6, 2**32, 140_000]
        assert torch.equal(found[1], codes)
        assert found[1].dtype == torch.int8
        assert found[2].tolist() == [3.0, -2.0]
        assert found[3].tolist() == [2.0, -1.0]


def test_members_that_compute_another_thing_are_told() -> None:
    def work(team: Team) -> str:
        with pytest.raises(TeamError) as raised:
            check_alike(team, "model.layers.3", team.rank)
        return str(raised.value)

    assert all("model.layers.3: the workers' results differ" in said for said in together(2, work))


@pytest.mark.parametrize(
    "how",
    [
        {"scheme": "FP8", "kv_cache": "fp8/head"},
        {"scheme": "FP8", "rotations": ["R1", "R2"], "lm_head": "W8A16@32", "embedding": "W8A16@32"},
    ],
    ids=["kv", "rotated"],
)
def test_what_is_measured_by_magnitudes_is_the_same(fixtures: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    """Scales of inputs, of keys and of values: no sum is in them."""
    alone = quantized(fixtures / "tiny", tmp_path / "alone", **how)
    shared = quantized(fixtures / "tiny", tmp_path / "shared", 3, **how)
    assert any(name.endswith("input_scale") for name in alone)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(shared[name], tensor) for name, tensor in alone.items())


@pytest.mark.parametrize("algorithm", ["awq+gptq", "smoothquant+gptq"])
def test_what_is_measured_by_sums_is_nearly_the_same(fixtures: Path, tmp_path: Path, algorithm: str) -> None:
    """Sums in another order round what lies on an edge the other way: few codes, some 2 % of the noise."""
    scheme = "W8A8" if algorithm.startswith("smooth") else "W4A16@32"
    alone, shared = (
        octavo.quantize(
            fixtures / "tiny",
            tmp_path / str(workers),
            scheme=scheme,
            algorithm=algorithm,
            data=TEXT,
            evaluate=False,
            calibration_workers=workers,
        )
        for workers in (1, 2)
    )
    for a, b in zip(alone.layers, shared.layers, strict=True):
        assert a.output_snr_db == pytest.approx(b.output_snr_db, abs=0.1)


def test_a_step_is_by_the_gradients_of_all() -> None:
    """Whole numbers, whose sums are exact. One member has no gradient of one expert, and nobody any of another."""
    names = ["both", "one", "none"]
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randint(-8, 9, (2, 32, 64), generator=generator).float()
    scheme = parse_scheme("W4A16@32")

    def weights() -> BlockWeights:
        plain = {name: torch.randn(32, 64, generator=torch.Generator().manual_seed(len(name))) for name in names}
        learned = {name: LearnedRounding(weight, quantize_weight(weight, scheme)) for name, weight in plain.items()}
        return BlockWeights({name: [name] for name in names}, {}, learned, torch.float32, torch.device("cpu"))

    def moved(team: Team, both: Tensor, one: Tensor | None) -> BlockWeights:
        block = weights()
        moving = block.weights()
        losses = [(moving["both"] * both).sum()] + ([] if one is None else [(moving["one"] * one).sum()])
        block.move(team, moving, losses, 20.0)
        return block

    def work(team: Team) -> BlockWeights:
        return moved(team, gradients[team.rank], gradients[0] if team.rank == 1 else None)

    alone = moved(ALONE, gradients.sum(0), gradients[0])
    start = weights()
    for found in together(2, work):
        for name in names:
            codes = found.learned[name].result().codes
            assert torch.equal(codes, alone.learned[name].result().codes)
            assert torch.equal(codes, start.learned[name].result().codes) == (name == "none")


def test_tuning_together_gains(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture, by members that are threads of this process: both find the same errors, and less than at the start."""
    found: list[list[Tuned]] = [[], []]

    def noted(*given: Any, team: Team, **how: Any) -> Tuned:
        found[team.rank].append(tune.tune(*given, team=team, **how))
        return found[team.rank][-1]

    monkeypatch.setattr(block, "tune", noted)
    monkeypatch.setattr(tune, "STEPS", tune.STEPS // 4)
    monkeypatch.setattr(tune, "ROUNDING_RATE", 4 * tune.ROUNDING_RATE)
    model = fixtures / "tiny-moe"
    out = tmp_path / "out"
    recipe = Recipe("W2A16@32", algorithm="tune")
    members = [
        prepare(model, out, recipe, calibration=calibration(model, torch.stack(TEXT)), resume=True, layouts=LAYOUTS)
        for _ in range(2)
    ]
    memory = os.memfd_create("octavo-test")

    @contextmanager
    def gather(work: Workspace) -> Iterator[Team]:
        groups = [Shared(memory, rank, 2) for rank in range(2)]
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(follow_model, members[1], work.directory, list(work.units), Member(groups[1]))
            try:
                yield Member(groups[0])
            except BaseException:
                groups[0].stop("the first has ended")
                raise
            done.result()

    try:
        quantize_model(members[0], gather_team=gather)
    finally:
        os.close(memory)
    first, second = ([(tuned.error_before, tuned.error) for tuned in of_member] for of_member in found)
    assert first == second
    assert len(first) == 2
    assert all(error < 0.9 * before for before, error in first)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    found = [int(child) for path in children for child in path.read_text().split()]
    return [pid for pid in found if WORKER in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def is_running(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def whole(fixtures: Path, tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    """Of a run that nothing has ended."""
    out = tmp_path_factory.mktemp("whole") / "out"
    uninterrupted = tuning(fixtures / "tiny", out, text, "--calibration-workers", "2")
    subprocess.run(uninterrupted, check=True, capture_output=True, timeout=PATIENCE)
    return digest(out)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["worker", "driver"])
def test_a_killed_process_ends_all_and_the_rest_is_resumed(
    fixtures: Path, tmp_path: Path, text: Path, whole: str, killed: str
) -> None:
    out = tmp_path / "out"
    shared = tuning(fixtures / "tiny", out, text, "--calibration-workers", "2")
    with subprocess.Popen(shared, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        until(lambda: len(read_manifest(partial_of(out))["units"]) == 2)
        (worker,) = workers_of(process)
        os.kill(worker if killed == "worker" else process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
    until(lambda: not is_running(worker))
    if killed == "worker":
        assert process.returncode == 1
        assert "calibration worker 1 of 2 ended (killed by signal 9)" in said
        assert "--resume" in said
    alone = tuning(fixtures / "tiny", out, text, "--resume")
    refused = subprocess.run(alone, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert refused.returncode == 1
    assert "has another number of workers" in refused.stderr
    subprocess.run([*shared, "--resume"], check=True, capture_output=True, timeout=PATIENCE)
    assert digest(out) == whole
    assert (out / MANIFEST).is_file()
    assert not list(out.glob("hidden-*"))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"calibration_workers": 4, "algorithm": "gptq"},
            "48 samples of 128 tokens are 3 batches, which no more workers",
        ),
        ({"calibration_workers": 2, "algorithm": "rtn", "data": None}, "algorithm rtn has no samples to share"),
        ({"calibration_workers": 0, "algorithm": "gptq"}, "calibration_workers 0: 1 or more are needed"),
    ],
    ids=str,
)
def test_what_can_t_be_shared_is_refused(fixtures: Path, tmp_path: Path, how: dict[str, Any], says: str) -> None:
    given = {"data": TEXT, "evaluate": False, "scheme": "W4A16@32"} | how
    with pytest.raises((QuantizeError, RecipeError, ValueError), match=says):
        octavo.quantize(fixtures / "tiny", tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())
