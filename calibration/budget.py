"""Mixed precision under a budget: how much each part of the model minds being rounded, and who gets how many bits.

Sensitivity of a unit (the layers of a block that share an input) is the KL divergence of the model's next-token
distribution from the original's when that unit alone is rounded. It is measured with one scheme; for the others it is
scaled by the unit's output error, since a small change of logits costs KL in proportion to its square. The choice is a
knapsack, solved exactly up to a thousandth of the budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.calibration.algorithms.gptq import gptq_loss, output_energy
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.block import Runner
from octavo.calibration.hidden_states_file import BATCH_TOKENS
from octavo.calibration.output import make_format, scale_dtype
from octavo.calibration.plan import Item, Plan
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress
from octavo.calibration.recipe import Recipe, RecipeError, parse_scheme
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import quantize_weight

MAX_TOKENS = 1024  # whose KL is measured: units differ by far more than its error over so many
STEPS = 4000  # of the knapsack's budget
LOGIT_ROWS = 256


@dataclass(frozen=True)
class Choice:
    """The cost of a scheme for one unit: its bits, and the KL that it adds to the model."""

    scheme: str
    bits: int
    kl: float


@dataclass(frozen=True)
class Sensitivity:
    """A unit: its layers' modules, their weights in number, KL when it alone is rounded, and what could be chosen."""

    name: str
    modules: tuple[str, ...]
    weights: int
    choices: tuple[Choice, ...]


def candidates(recipe: Recipe, budget: float) -> list[str]:
    """The schemes to choose from. Three bits and two, which few engines read, only where the budget asks for them.

    Raises RecipeError for a budget that is no number of bits, and for a recipe that leaves no choice.
    """
    if not 0 < budget < math.inf:
        raise RecipeError(f"--bits-budget {budget:g}: bits per weight are a number above 0, such as 4.5")
    if recipe.format in ("awq", "fp8"):
        raise RecipeError(
            f"--bits-budget gives layers different schemes, and format {recipe.format} has one for all; "
            "compressed-tensors and gptq have several"
        )
    base, _, group_size = _of(recipe).partition("@")
    if not base.startswith("W4A16"):
        raise RecipeError(f"--bits-budget chooses among weight-only schemes around 4 bits, not {recipe.scheme}; W4A16")
    names = [f"{base}@{group_size}", f"W8A16@{group_size}"]
    if group_size != "32":
        names.insert(1, f"{base}@32")
    if budget < 4.6:
        names.insert(0, f"W3A16@{group_size}")
    if budget < 3.6:
        names.insert(0, f"W2A16@{group_size}")
    return names


def _of(recipe: Recipe) -> str:
    """The candidate that is the recipe's own scheme: its name always has a group size."""
    base, _, size = recipe.scheme.partition("@")
    return f"{base}@{size or parse_scheme(recipe.scheme).weight.granularity.group_size}"


def check_budget(plan: Plan, recipe: Recipe, budget: float, schemes: Sequence[str]) -> None:
    """Raise RecipeError for a budget that the cheapest schemes exceed: sizes are known without measuring."""
    items = [item for unit in plan.units for item in unit.items if item.linear is not None]
    weights = sum(item.spec.numel for item in items)
    _check_least(min(_bits(items, recipe, scheme) for scheme in schemes), weights, budget)


def _check_least(least: int, weights: int, budget: float) -> None:
    if least > budget * weights:
        raise RecipeError(
            f"--bits-budget {budget:g}: the smallest schemes take {least / weights:.2f} bits per weight, scales "
            "included; a larger budget or group size works"
        )


def carried_bytes(runner: Runner) -> int:
    """Bytes that `measure` holds beside a block: the hidden states of one variant of the model for each unit."""
    units = 4 * runner.num_blocks  # qkv, o, gate_up and down
    return (units + 2) * MAX_TOKENS * runner.hidden_size * runner.dtype.itemsize


def measure(
    planned: Prepared, calibration: Calibration, schemes: Sequence[str], progress: Progress
) -> list[Sensitivity]:
    """Sensitivity of every unit, one block in memory at a time, over the first MAX_TOKENS of the text."""
    checkpoint = planned.checkpoint
    plan = planned.plan
    recipe = planned.recipe
    runner = calibration.runner
    token_ids = calibration.token_ids
    samples = token_ids[: max(1, MAX_TOKENS // token_ids.shape[1])]
    original = runner.embed(samples, checkpoint.tensor(runner.embedding_name))
    variants: list[Tensor] = []
    units: list[Sensitivity] = []
    blocks = [unit for unit in plan.units if unit.index is not None]
    for number, unit in enumerate(blocks):
        progress(number * (number + 1), len(blocks) * (len(blocks) + 1), f"sensitivity of {unit.name}")
        tensors = {item.name: item.file.read(item.name) for item in unit.items}
        layer = runner.build(number, tensors)
        variants = [_forward(runner, layer, hidden) for hidden in variants]
        stats, following = _observe(runner, layer, original)
        for name, (modules, inputs) in _units(runner, number, layer, plan).items():
            items = [item for item in unit.items if item.linear is not None and item.linear.module in modules]
            rounded, errors = _round(items, tensors, {m: stats[g] for m, g in inputs.items()}, recipe, schemes)
            variants.append(_forward(runner, runner.build(number, tensors | rounded), original))
            bits = {scheme: _bits(items, recipe, scheme) for scheme in schemes}
            choices = tuple(Choice(s, bits[s], errors[s] / errors[_of(recipe)]) for s in schemes)
            weights = sum(item.spec.numel for item in items)
            units.append(Sensitivity(f"{unit.name}.{name}", tuple(modules), weights, choices))
        original = following
    found = _divergences(checkpoint, runner, original, variants, progress)
    return [_scaled(unit, kl) for unit, kl in zip(units, found, strict=True)]


def _scaled(unit: Sensitivity, kl: float) -> Sensitivity:
    return replace(unit, choices=tuple(replace(choice, kl=choice.kl * kl) for choice in unit.choices))


def _units(runner: Runner, index: int, layer: Any, plan: Plan) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Unit -> its modules, and the input group of each; the experts' parts of a kind are one."""
    units: dict[str, tuple[list[str], dict[str, str]]] = {}
    for group in runner.groups(index, layer):
        modules, inputs = units.setdefault(re.sub(r"\.\d+\.", ".*.", group.name), ([], {}))
        for module in group.modules:
            if module in plan.schemes:
                modules.append(module)
                inputs[module] = group.name
    return {name: unit for name, unit in units.items() if unit[0]}


def _observe(runner: Runner, layer: Any, hidden: Tensor) -> tuple[dict[str, InputStats], Tensor]:
    """Statistics of the inputs of a block's layers, and its output."""
    collectors: dict[str, StatsCollector] = {}

    def record(name: str, x: Tensor) -> None:
        collectors.setdefault(name, StatsCollector(x.shape[1], x.device)).add(x)

    output = _forward(runner, layer, hidden, record)
    return {name: collector.result() for name, collector in collectors.items()}, output


def _forward(runner: Runner, layer: Any, hidden: Tensor, record: Callable[[str, Tensor], None] | None = None) -> Tensor:
    """hidden [S, T, H] through one block, a few samples at a time."""
    batch = max(1, BATCH_TOKENS // hidden.shape[1])
    return torch.cat([runner.forward(layer, part, record) for part in torch.split(hidden, batch)])


def _round(
    items: Sequence[Item],
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    recipe: Recipe,
    schemes: Sequence[str],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A unit's weights rounded with the recipe's scheme, and the energy of its output's error with each scheme."""
    rounded: dict[str, Tensor] = {}
    errors = dict.fromkeys(schemes, 1e-30)  # a unit that is exact with one scheme has a ratio all the same
    for item in items:
        assert item.linear is not None
        weight = tensors[item.name]
        seen = stats[item.linear.module]
        signal = output_energy(weight.float(), seen.moments)
        for spelled in schemes:
            scheme = parse_scheme(spelled)
            stored = scale_dtype(recipe, weight.dtype)
            back = quantize_weight(weight, scheme, recipe.search_of(scheme), scale_dtype=stored).dequantize()
            errors[spelled] += gptq_loss(weight, back, seen) * signal
            if spelled == _of(recipe):
                rounded[item.name] = back.to(weight.dtype)
    return rounded, errors


def _bits(items: Sequence[Item], recipe: Recipe, scheme: str) -> int:
    """Bits that the unit's layers take on the disk."""
    total = 0
    for item in items:
        assert item.linear is not None
        format_ = make_format(recipe, parse_scheme(scheme), item.spec.dtype)
        total += sum(s.nbytes for s in format_.tensors(item.linear.out_features, item.linear.in_features).values())
    return 8 * total


def _divergences(
    checkpoint: Checkpoint, runner: Runner, original: Tensor, variants: Sequence[Tensor], progress: Progress
) -> list[float]:
    """Mean KL of each variant's next-token distribution from the original's, in nats."""
    head = runner.head(checkpoint.tensor)
    sums = [0.0] * len(variants)
    rows = torch.split(original.flatten(0, 1), LOGIT_ROWS)
    others = [torch.split(variant.flatten(0, 1), LOGIT_ROWS) for variant in variants]
    for number, part in enumerate(rows):
        truth = F.log_softmax(head(part), dim=-1)
        probabilities = truth.exp()
        for i, other in enumerate(others):
            guess = F.log_softmax(head(other[number]), dim=-1)
            sums[i] += float((probabilities * (truth - guess)).sum())
        progress(number + 1, len(rows), "sensitivity")
    return [max(total, 0.0) / original.shape[0] / original.shape[1] for total in sums]


def choose(units: Sequence[Sensitivity], budget: float) -> dict[str, str]:
    """Unit -> scheme: the least sum of KL with at most `budget` bits per weight on average.

    Dynamic programming over units and STEPS of the budget above the cheapest choice; bits are rounded up to steps, so
    the budget holds. Raises RecipeError for a budget that the cheapest schemes exceed.
    """
    weights = sum(unit.weights for unit in units)
    least = sum(min(choice.bits for choice in unit.choices) for unit in units)
    _check_least(least, weights, budget)
    room = budget * weights - least
    step = max(room / STEPS, 1e-9)
    best = torch.zeros(STEPS + 1, dtype=torch.float64)
    picks: list[Tensor] = []
    for unit in units:
        cheapest = min(choice.bits for choice in unit.choices)
        costs = []
        for choice in unit.choices:
            steps = -int(-(choice.bits - cheapest) // step)
            shifted = torch.full_like(best, torch.inf)
            if steps <= STEPS:
                shifted[steps:] = best[: STEPS + 1 - steps] + choice.kl
            costs.append(shifted)
        best, pick = torch.stack(costs).min(0)
        picks.append(pick)
    chosen = {}
    left = STEPS
    for unit, pick in zip(reversed(units), reversed(picks), strict=True):
        choice = unit.choices[int(pick[left])]
        chosen[unit.name] = choice.scheme
        left -= -int(-(choice.bits - min(c.bits for c in unit.choices)) // step)
    return chosen


def budgeted(recipe: Recipe, units: Sequence[Sensitivity], budget: float) -> Recipe:
    """The recipe with the scheme of each unit's layers that `choose` gives them."""
    chosen = choose(units, budget)
    layers = {module: chosen[unit.name] for unit in units for module in unit.modules}
    counted = [chosen[unit.name] for unit in units for _ in unit.modules]
    most = max(dict.fromkeys(counted), key=counted.count)
    return msgspec.structs.replace(
        recipe, scheme=most, layers={m: s for m, s in layers.items() if s != most} | dict(recipe.layers)
    )
