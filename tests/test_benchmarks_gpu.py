"""The GPU benchmarks without a GPU: their formulas, their table, what tuning writes, what the simulation predicts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # whoever runs `pytest` and not `python -m pytest` doesn't have it there

from benchmarks import (  # noqa: E402
    gpu_around,
    gpu_gemms,
    gpu_launches,
    gpu_rows,
    gpu_step,
    kernels,
    shapes,
    simulate,
    tune,
)
from benchmarks.gpu_case import FEW_BITS, Bodies, Case, Goal, error_of  # noqa: E402
from benchmarks.gpu_clock import HostClock, Timing, summarize  # noqa: E402
from benchmarks.gpu_table import Result, derive, geomeans, write  # noqa: E402

from octavo.kernels.launching import tuning  # noqa: E402
from octavo.kernels.launching.launch import Launch  # noqa: E402
from octavo.runtime.config import EngineConfig  # noqa: E402
from octavo.runtime.model.weights import load_model  # noqa: E402

LLAMA = shapes.CONFIGS["llama-3.1-8b"]
GB, MS = 1e9, 1e-3
META = torch.device("meta")


def test_what_a_step_of_llama_reads() -> None:
    """Numbers worked out by hand: 6.979 G linear weights, 0.525 G of the head, 65,536 numbers a token in the cache."""
    assert shapes.linear_weights(LLAMA) == 6_979_321_856
    assert shapes.head_bytes(LLAMA) == 1_050_673_152
    assert shapes.kv_elements(LLAMA) == 65_536
    for weights, wanted in (("bf16", 15.01), ("fp8", 8.03), ("int4", 4.65)):
        assert shapes.streamed_bytes(LLAMA, weights) / GB == pytest.approx(wanted, abs=0.005)
    for weights, kv, batch, context, wanted in (
        ("bf16", "bf16", 1, 1024, 5.05),
        ("fp8", "fp8", 1, 1024, 2.70),
        ("fp8", "fp8", 128, 1024, 5.54),
        ("int4", "fp8", 32, 4096, 4.41),
    ):
        seconds = shapes.step_bytes(LLAMA, weights, kv, batch, context) / 3.0e12
        assert seconds / MS == pytest.approx(wanted, abs=0.01)


def test_shapes_of_gemms() -> None:
    assert shapes.linears(LLAMA) == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert shapes.linears(shapes.CONFIGS["llama-3.3-70b"])["gate_up"] == (57344, 8192)
    assert shapes.linears(shapes.CONFIGS["qwen3-30b-a3b"])["down"] == (2048, 768)
    assert shapes.gemm_flops(8192, 8192, 8192) == 1_099_511_627_776
    assert shapes.gemm_bytes(1, 4096, 4096, shapes.WEIGHT_BYTES["int4"], 2) == 8_650_752 + 2 * 4096 + 2 * 4096
    assert shapes.prefill_flops(32, 128, 8192) == pytest.approx(2 * 32 * 128 * 8192**2, rel=1e-3)
    assert shapes.prefill_flops(1, 1, 3, 5, window=4) == 4 * (4 + 4 + 4)
    assert shapes.prefill_flops(1, 1, 3, 1, window=3) == 4 * (2 + 3 + 3)


def test_experts_that_a_step_hits() -> None:
    mixture = shapes.CONFIGS["qwen3-30b-a3b"]
    assert shapes.experts_hit(mixture, 1) == pytest.approx(8)
    assert shapes.experts_hit(mixture, 4096) == pytest.approx(128)
    assert shapes.experts_hit(LLAMA, 7) == 1
    assert 29.5e9 < shapes.linear_weights(mixture) < 30.5e9


@pytest.mark.parametrize("name", shapes.CONFIGS)
def test_a_config_loads_with_random_weights(name: str, tmp_path: Path) -> None:
    directory = shapes.write_config(shapes.shrunk(shapes.CONFIGS[name]), tmp_path / name)
    model = load_model(EngineConfig(model=str(directory), load_format="dummy", device="cpu", max_model_len=64))
    assert model.vocab_size == 512
    assert len(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]) == 512


def case(expected: float, **changes: Any) -> Case:
    def make(device: torch.device) -> Bodies:
        x = torch.ones(4, device=device)
        stock = {"stock": lambda: x + 1, "absent": lambda: torch.ops.aten.no_such_operator(x)}
        return Bodies(lambda: [x + 1], lambda: [torch.full((4,), expected, dtype=torch.float64)], stock)

    return Case(
        "2", "adding", "4", 3_000_000, 6_000_000, make, goals=(Goal("stock", 0.0), Goal("absent", 1.0)), **changes
    )


def test_a_kernel_is_compared_and_timed_beside_what_there_is() -> None:
    result = kernels.measure(case(2.0), HostClock(), 100.0)
    assert result.failure is None
    assert result.error == 0
    assert isinstance(result.baselines["stock"], float)
    assert "no_such_operator" in str(result.baselines["absent"])
    assert [goal[3] for goal in result.goals] == [True, False]


def test_a_wrong_kernel_and_one_that_raises_say_so() -> None:
    assert "wrong" in str(kernels.measure(case(2.1), HostClock(), 100.0).failure)
    assert "wrong" in str(kernels.measure(case(float("nan")), HostClock(), 100.0).failure)

    def broken(device: torch.device) -> Bodies:  # noqa: ARG001
        raise RuntimeError("no memory")

    result = kernels.measure(Case("2", "adding", "4", 1, 1, broken), HostClock(), 100.0)
    assert result.failure == "RuntimeError: no memory"


@pytest.mark.parametrize("kind", ["6 norm to fp8 of 4 sums", "8 rope", "4 W4A16"])
def test_cases_of_octavo_s_kernels_run_and_are_right(kind: str) -> None:
    made = [*gpu_rows.cases(tiny=True), *gpu_gemms.cases(tiny=True)]
    result = kernels.measure(next(c for c in made if kind in c.name), HostClock(), 100.0)
    assert result.failure is None


def test_case_names_are_all_different() -> None:
    names = [c.name for c in kernels.every_case()]
    assert len(set(names)) == len(names)
    assert {name.split()[0] for name in names} >= {str(row) for row in range(1, 12)}


@pytest.mark.parametrize(("seconds", "why"), [(5.0, "5 s were over"), (480.0, "2 processes ended before")])
def test_what_is_not_run_is_named(seconds: float, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process begins without time to end it; two that end at once are enough."""
    monkeypatch.setattr(kernels, "work", print)  # takes any arguments, and ends
    cases = [case(2.0, first=bool(i)) for i in range(4)]
    args = argparse.Namespace(seconds=seconds)
    found = [str(result.failure) for result in kernels.results_of(cases, args, {}, time.monotonic())]
    assert len(found) == 4
    assert all(failure.startswith(f"not run: {why}") for failure in found[-2:])
    assert found[:2] == (found[2:] if seconds < 10 else ["its process ended"] * 2)


def test_a_step_that_reaches_its_goal_says_so_and_one_without_room_is_no_failure() -> None:
    record = {"batch": 1, "context": 1024, "forward": 3.5, "sampling": 0.05, "limit": 3.0, "goal": 3.6}
    assert gpu_step.row_of(record).endswith("| 3.6 reached |")
    assert gpu_step.row_of({**record, "forward": 3.6}).endswith("| 3.6 missed |")
    assert gpu_step.row_of({**record, "goal": None}).endswith("| 282 |  |")
    assert "| no room |" in gpu_step.row_of({"batch": 256, "context": 4096, "left out": "no room"})


def test_the_table_says_what_was_reached(tmp_path: Path) -> None:
    good, bad = Result("2", "fp8 rows", "M 1"), Result("4", "W4A16", "M 1", failure="its process ended")
    good.us, good.spread, good.baselines = 10.0, 0.02, {"stock": 25.0}
    goals = (Goal("copy", 0.8), Goal("us", 5.0), Goal("stock", 2.0), Goal("TFLOP/s", 1.0))
    derive(good, Case("2", "fp8 rows", "M 1", 27_000_000, 20_000_000, case(2.0).make, goals=goals), 3000.0)
    assert good.gb_per_s == pytest.approx(2700)
    assert good.of_copy == pytest.approx(0.9)
    assert [goal[3] for goal in good.goals] == [True, False, True, True]
    assert list(geomeans([good]).values()) == [2.5]
    path = write(tmp_path, "kernels", "Kernels", [good, bad], {"card": "a card"})
    text = path.read_text()
    assert "| 2 | fp8 rows | M 1 | 10.0 (±1%) | 2700 | 90% | 2 |" in text
    assert "**its process ended**" in text
    assert "goals reached: 3 of 4" in text
    assert json.loads(path.with_suffix(".json").read_text())["facts"] == {"card": "a card"}


def test_a_median_and_its_spread() -> None:
    timing = summarize([10.0] * 8 + [9.0, 30.0])
    assert timing.us == 10.0
    assert timing.spread == pytest.approx(0.0, abs=0.2)


def test_tuning_keeps_the_others_rows(tmp_path: Path) -> None:
    base, path = tmp_path / "h100.json", tmp_path / "h200.json"
    base.write_text(json.dumps({"fp8": [{"split_k": 1}], "int4": [{"split_k": 2}]}))
    tune.merge(path, "fp8", [{"m": 16, "split_k": 4}, {"split_k": 1}], base)
    assert json.loads(path.read_text()) == {"fp8": [{"m": 16, "split_k": 4}, {"split_k": 1}], "int4": [{"split_k": 2}]}
    tune.merge(path, "moe", [{"block_m": 16}])
    assert list(json.loads(path.read_text())) == ["fp8", "int4", "moe"]


def test_every_family_of_the_tables_can_be_tuned() -> None:
    assert set(tune.FAMILIES) == set(tuning.rows_of("h100"))
    for family in tune.FAMILIES:
        work = list(tune.problems(family))
        assert work[-1].bounds == {}
        for problem in work if family in tune.SMALL else ():
            names = set(tuning.choose(family, *problem.size, META))
            assert all(set(row) == names for row in problem.rows), (family, problem.bounds)


def test_what_no_row_bounds_is_tuned_beyond_all_bounds() -> None:
    """Or the last row would be measured at a size that another has, and become that one."""
    for family in tune.SMALL:
        rows, work = tuning.rows_of("h100")[family], list(tune.problems(family))
        bounds = [row["m"] for row in rows if "m" in row]
        for row, problem in zip(rows, work, strict=True):
            assert problem.size[0] == row["m"] if "m" in row else problem.size[0] > max(bounds, default=0)
    over_heads = list(tune.problems("norms over heads"))
    assert [tuning.choose("norms over heads", *problem.size, META)["again"] for problem in over_heads] == [0, 1, 0]


def test_tuning_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of real candidates in the interpreter, with a clock that prefers some; one block is no power of two."""

    class Told(HostClock):
        def together(self, bodies: dict[str, list[Any]]) -> Any:
            found, problems = super().together(bodies)
            row = tuning.rows_of(tune.card())["moe sum"][0]
            return {name: Timing(abs(row["block"] - 500) + row["num_warps"], 0.0) for name in found}, problems

    rows = [{"block": 500, "num_warps": 1}, *tune.SMALL["moe sum"].rows]
    small = tune.Small(rows, 2048, lambda _, n, device: gpu_around.sum_case(2, n, 2, device))
    monkeypatch.setitem(tune.SMALL, "moe sum", small)
    monkeypatch.setitem(tuning.rows_of(tune.card()), "moe sum", tuning.rows_of(tune.card())["moe sum"])
    assert tune.tuned("moe sum", torch.device("cpu"), Told(), 60.0) == [{"block": 512, "num_warps": 1}]
    assert tuning.choose("moe sum", 64, 2048, 8, META) == {"block": 512, "num_warps": 1}
    tuning.row_of.cache_clear()


@pytest.mark.parametrize("family", ["fp8", "int4"])
def test_candidates_are_what_launchers_take(family: str) -> None:
    kept = {**tuning.rows_of("h100")}[family]
    try:
        for m in (16, 256, tune.MANY_TOKENS):
            for row in tune.gemm_rows(family, m):
                tune.install(family, row)
                work, parts = simulate.gemm_work("a layer", family, m, 4096, 4096)
                assert work.launch is None or work.launch.num_stages == row["num_stages"]
                assert parts == (row["split_k"] if row.get("split_k", 1) > 1 else 0)
    finally:
        tuning.rows_of("h100")[family] = kept
        tuning.row_of.cache_clear()


@pytest.mark.parametrize("family", tune.MIXTURES)
def test_candidates_are_what_mixtures_take(family: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Each row is one of the table's, by its names, and a mixture launched with it has its sizes."""
    kept = tuning.rows_of("h100")[family]
    names = set(kept[-1])
    assert all(set(row) == names for m in (16, 64, tune.MANY_TOKENS) for row in tune.mixture_rows(family, m))
    monkeypatch.setitem(tuning.rows_of("h100"), family, kept)
    try:
        tune.install(family, tune.mixture_rows(family, 16)[0])
        bodies = kernels.gpu_moe.mixture(5, family.removeprefix("moe "), (4, 2, 256, 128), device)
        assert error_of(bodies, bodies.run()) < FEW_BITS
    finally:
        tuning.row_of.cache_clear()


@pytest.mark.parametrize("family", [*tune.GEMMS, *tune.MIXTURES, "paged decode", "paged prefill"])
def test_a_tuned_table_has_a_row_for_every_size(family: str) -> None:
    problems = list(tune.problems(family))
    before = tuning.rows_of("h100")[family]
    rows = [*tune.untouched(family, before), *(problem.bounds for problem in problems)]
    assert problems[-1].bounds == {}
    assert all(problem.rows for problem in problems)
    if family == "paged decode":  # float32, and heads of 256, keep what fits them
        assert [row for row in rows if row.get("k") == 4 or row.get("n") == 129] == before[:2]


def small(launch: Launch) -> simulate.Resources:  # noqa: ARG001
    """Two blocks an SM: 100 KiB of shared memory each."""
    return simulate.Resources(64, 100 << 10, 100, 20)


def test_a_predicted_kernel() -> None:
    work, _ = simulate.gemm_work("gate_up", "fp8", 16, 28672, 4096)
    assert work.num_bytes == 28672 * 4096 + 16 * 4096 + 2 * 16 * 28672
    p = simulate.predict(work, small)
    assert p.resident == 2
    assert p.waves == pytest.approx(448 / 264)
    assert p.bound == "memory"
    assert p.seconds == pytest.approx(1e-6 + 2 * 0.8e-6 + work.num_bytes / 3.0e12)


def test_few_blocks_cannot_fill_the_memory() -> None:
    work, parts = simulate.gemm_work("o", "fp8", 16, 4096, 4096)
    assert parts > 1
    alone = simulate.Work("o", work.launch, work.num_bytes, blocks=16)
    assert simulate.predict(alone, lambda _: simulate.Resources(64, 16 << 10, 10, 0)).bound == "too little in flight"


def test_what_stands_in_a_loop_is_counted_for_each_turn() -> None:
    work, _ = simulate.gemm_work("gate_up", "fp8", 16, 28672, 4096)
    busy = simulate.Resources(64, 16 << 10, 100_000, 60_000)
    turns = {n: simulate.predict(replace(work, turns=n), lambda _: busy) for n in (1, 5)}
    assert {p.bound for p in turns.values()} == {"issue"}
    blocks, warps = 4, 4  # 448 over 132 SMs
    more = turns[5].seconds - turns[1].seconds
    assert more == pytest.approx(blocks * warps * 4 * 60_000 / (4 * 1.7e9))


@pytest.mark.parametrize("name", shapes.CONFIGS)
def test_a_step_is_slower_than_its_limit_and_has_the_decoder_s_launches(name: str) -> None:
    config = shapes.CONFIGS[name]
    for weights in ("int4", "fp8"):
        step = simulate.step(config, weights, "fp8", 32, 1024, small)
        assert step.ms > step.limit
        assert step.launches == config["num_hidden_layers"] * (8 + shapes.is_mixture(config)) + 6


def test_every_case_is_predicted_and_moves_and_computes_what_it_says() -> None:
    for c in kernels.every_case():
        works = gpu_launches.works(c)
        assert works, c.name
        assert sum(work.num_bytes for work in works) >= c.num_bytes * (1 - 1e-9), c.name
        assert sum(work.flops for work in works) >= c.flops * (1 - 1e-9), c.name
        us, bound, launches = simulate.predicted(c, small)
        assert us > 1e6 * c.num_bytes / simulate.COPY, c.name
        assert (":" in bound) == (launches > 1), c.name


def test_a_gemm_s_bytes_are_those_of_its_tensors() -> None:
    for c in gpu_gemms.cases():
        (first, *others) = gpu_launches.started_by(c).started
        if not others:
            assert sum(t.nbytes for t in first.tensors.values()) == pytest.approx(c.num_bytes, rel=0.02), c.name
            assert first.products == c.flops / 2


def test_a_mixture_s_bytes_are_shared_out_among_its_launches() -> None:
    (c,) = (c for c in kernels.gpu_moe.cases() if "mixture, fp8, 16 tokens" in c.name)
    works = gpu_launches.works(c)
    assert [work.name for work in works] == ["router", "quantize_rows", "gemm_swap_ab", "gated", "gemm_swap_ab", "sum"]
    assert works[2].num_bytes == pytest.approx(2 * works[4].num_bytes, rel=0.01)  # gate and up, and down
    assert works[2].flops == pytest.approx(2 * works[4].flops)
    assert [work.near for work in works] == [True, True, False, True, False, True]
    assert works[5].num_bytes == 16 * 8 * 2048 * 2  # what the second GEMM left


def test_a_weight_without_memory_is_packed_as_one_that_has_some() -> None:
    for ints in gpu_gemms.OTHER_INTS.values():
        weight = gpu_gemms.int_weight(torch.randn(48, 256), ints)
        packed, wanted = gpu_launches.pack_on_meta(
            weight.codes.to("meta"), weight.scale.to("meta"), weight.zero, weight.groups, bits=ints.bits
        ), weight.packed  # fmt: skip
        assert (packed.bits, packed.group_size, packed.num_bytes) == (wanted.bits, wanted.group_size, wanted.num_bytes)
        assert (packed.scale.shape, packed.scale.dtype) == (wanted.scale.shape, wanted.scale.dtype)
        assert (packed.order is None) == (wanted.order is None) == (not ints.act_order)


def test_what_nothing_predicts_is_refused() -> None:
    def sums(device: torch.device) -> Bodies:
        x = torch.ones(4, device=device)
        return Bodies(lambda: [x.cumsum(0)], lambda: [x.double()])

    with pytest.raises(NotImplementedError, match="aten::cumsum takes time"):
        gpu_launches.works(Case("-", "sums", "4", 16, 0, sums))


H100 = {"card": "NVIDIA H100 80GB HBM3"}


def test_predictions_are_not_compared_with_another_card_s_times(tmp_path: Path) -> None:
    result = Result("7", "silu to fp8", "64 tokens x 14336", us=5.0)
    path = write(tmp_path, "kernels", "Kernels", [result], {"card": "NVIDIA A100-SXM4-80GB"})
    expected = (
        f"{path.with_suffix('.json').name} isn't compared: it is of NVIDIA A100-SXM4-80GB, and an H100 is predicted."
    )
    assert simulate.errors(tmp_path, small) == ["", expected]


def test_predictions_are_compared_with_what_was_measured(tmp_path: Path) -> None:
    result = Result("7", "silu to fp8", "64 tokens x 14336", us=5.0)
    wrong = Result("7", "silu to fp8", "1 tokens x 14336", us=5.0, failure="wrong: error 9e-1")
    write(tmp_path, "kernels", "Kernels", [result, wrong], H100)
    record = {"batch": 32, "context": 1024, "forward": 4.0, "sampling": 0.5}
    of = {"model": "llama-3.1-8b", "weights": "fp8", "kv": "fp8", "facts": H100}
    step = {**of, "records": [record, {**record, "failure": "no"}]}
    (tmp_path / "gpu_step-of-a-day.json").write_text(json.dumps(step))
    lines = simulate.errors(tmp_path, small)
    assert sum("7 silu to fp8" in line for line in lines) == 1
    assert any("7 silu to fp8, 64 tokens x 14336" in line for line in lines)
    predicted = 1e3 * simulate.step(LLAMA, "fp8", "fp8", 32, 1024, small, greedy=True).ms
    assert predicted < 1e3 * simulate.step(LLAMA, "fp8", "fp8", 32, 1024, small).ms  # whose tokens are drawn
    rows = [line for line in lines if "step, fp8, fp8 KV, 32 sequences of 1024" in line]
    assert rows == [f"| step, fp8, fp8 KV, 32 sequences of 1024 | {predicted:.1f} | 4500.0 | {predicted / 4500:.2f} |"]
    assert sum("Median ratio" in line for line in lines) == 2
