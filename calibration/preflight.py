"""Estimates the memory, disk and time of a quantization before it starts.

Memory and disk are counted from the plan. Time is counted from the arithmetic of the algorithms and the speed of two
small GEMMs, measured here and now: right to a factor of two, which is what a person needs to know.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from octavo.calibration.hidden_states_file import BATCH_TOKENS
from octavo.calibration.layers import LinearLayer
from octavo.calibration.plan import Plan, Unit
from octavo.calibration.recipe import Recipe
from octavo.calibration.tune import STEP_TOKENS, num_steps

PROCESS_BYTES = 450_000_000  # torch and the kernels, before anything is loaded
SIDE = 1024  # of the GEMMs whose speed is measured
AWQ_TRIALS = 50  # roundings of each weight in the search for scales and clipping
TUNING_BYTES = 20  # for each weight: its rounding and averages in float32, codes, what it is and the gradient of that
RTN_BYTES_PER_SECOND = 40e6  # weights read, searched and rounded by one core; a floor for what an estimate says


@dataclass(frozen=True)
class Estimate:
    """memory: the peak of the process, in bytes; disk: of the result and of what is needed while it is made."""

    memory: int
    disk: int
    seconds: float

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        lasting = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"about {self.memory / 1e9:.1f} GB of memory, {self.disk / 1e9:.2f} GB of disk, {lasting}"


def estimate(plan: Plan, recipe: Recipe, tokens: int, hidden_bytes: int) -> Estimate:
    """tokens of calibration text in all, 0 for none; hidden_bytes: all hidden states between two blocks."""
    largest = max(item.spec.nbytes for unit in plan.units for item in unit.items)
    disk = plan.bytes_after + 2 * hidden_bytes
    if not tokens:
        seconds = plan.bytes_before / RTN_BYTES_PER_SECOND
        return Estimate(PROCESS_BYTES + 4 * largest, disk, seconds)
    blocks = [unit for unit in plan.units if unit.index is not None]
    memory = PROCESS_BYTES + max(_block_memory(unit, recipe) for unit in blocks)
    slow = _speed(torch.float32)
    fast = _speed(torch.bfloat16)
    layers = [_inputs(unit) for unit in blocks]
    forward = sum(2 * 2 * n * k * tokens for unit in layers for k, n in unit)
    exact = 0.0
    if recipe.algorithm != "rtn":
        exact += sum(1.2 * k * k * tokens for unit in layers for k, _ in unit)
    if recipe.solver == "gptq":
        exact += sum(3 * n * k * k + 2 * k**3 for unit in layers for k, n in unit)
    if recipe.scaling is not None:
        exact += sum(AWQ_TRIALS * 2 * n * k * k for unit in layers for k, n in unit)
    if recipe.tunes:  # a step is a forward, and twice that back
        for unit in layers:
            moves = num_steps(max((k for k, _ in unit), default=0)) * STEP_TOKENS
            exact += sum(3 * 2 * n * k * moves for k, n in unit)
    return Estimate(memory, disk, forward / fast + exact / slow + plan.bytes_before / RTN_BYTES_PER_SECOND)


def _block_memory(unit: Unit, recipe: Recipe) -> int:
    """A block's tensors, and most of: what it takes to run them, to solve the widest layer, and to tune all."""
    inputs = _inputs(unit)
    if not inputs:  # a block that stays as it is runs, and that is all
        return 2 * unit.nbytes
    statistics = sum(4 * k * k for k, _ in inputs) if recipe.algorithm != "rtn" else 0
    widest = max(4 * n * k + (2 if recipe.solver == "gptq" else 0) * 2 * k * k for k, n in inputs)
    tuning = TUNING_BYTES * sum(k * n for k, n in inputs) if recipe.tunes else 0
    activations = 4 * BATCH_TOKENS * max(k + n for k, n in inputs)
    running = unit.nbytes + statistics + 4 * activations  # the tensors again, as the runner packs them
    return unit.nbytes + max(running, statistics + 4 * widest, tuning + 4 * activations)


def _inputs(unit: Unit) -> list[tuple[int, int]]:
    """(K, N) of the layers of a block that share an input, as far as names and shapes tell."""
    shared: dict[tuple[str, int], int] = {}
    linears: Mapping[str, LinearLayer] = {item.name: item.linear for item in unit.items if item.linear is not None}
    for linear in linears.values():
        owner, _, name = linear.kind.rpartition(".")
        last = "down" if name.startswith(("down", "w2")) else "o" if name.startswith("o_") else "in"
        key = (f"{owner}.{last}", linear.in_features)
        shared[key] = shared.get(key, 0) + linear.out_features
    return [(k, n) for (_, k), n in shared.items()]


def _speed(dtype: torch.dtype) -> float:
    """Operations per second of a GEMM."""
    a = torch.ones(SIDE, SIDE, dtype=dtype)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return 2 * SIDE**3 / min(times)
