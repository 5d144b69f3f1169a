"""Mixed precision under a budget: how much each part of the model minds being rounded, and who gets how many bits.

Sensitivity of a unit (the layers of a block that share an input, or all of its experts) is the KL divergence of the
model's next-token distribution from the original's when that unit alone is rounded, its input too where the scheme says
so. It is measured with one scheme; for the others it is scaled by the unit's output error, since a small change of
logits costs KL in proportion to its square. The choice is a knapsack, and is compared with the best single scheme of no
more bits, both measured as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.calibration.algorithms.gptq import gptq_loss, output_energy
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.block import INPUT_ROWS, Runner
from octavo.calibration.candidates import own_candidate
from octavo.calibration.hidden_states_file import BATCH_TOKENS
from octavo.calibration.layers import EXPERT
from octavo.calibration.output import make_format, scale_dtype
from octavo.calibration.plan import Item, Plan
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress
from octavo.calibration.recipe import Recipe, RecipeError, parse_scheme
from octavo.calibration.rounded_inputs import rounding_of, with_rounded_inputs
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import quantize_weight
from octavo.quant.scheme import QuantScheme

MAX_TOKENS = 1024  # whose KL is measured: units differ by far more than its error over so many
STATES = 10_000  # of the knapsack
BUDGETS = 8  # that are measured at a time where a KL is the target
APART = 0.01  # bits per weight between budgets that are told apart there
LOGIT_ROWS = 256
UNCOUNTED = ("weight_shape", "g_idx", "weight_global_scale", "input_global_scale")
"""Tensors that are no part of a weight's bits: W4A16@32 and NVFP4 have 4.5, to the bit."""


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
    original = _first_hidden(checkpoint, calibration)
    variants: list[Tensor] = []
    units: list[Sensitivity] = []
    blocks = [unit for unit in plan.units if unit.index is not None]
    own = parse_scheme(own_candidate(recipe))
    num_rows = INPUT_ROWS if any(parse_scheme(scheme).activation is not None for scheme in schemes) else 0
    for number, unit in enumerate(blocks):
        progress(number * (number + 1), len(blocks) * (len(blocks) + 1), f"sensitivity of {unit.name}")
        tensors = {item.name: item.file.read(item.name) for item in unit.items}
        layer = runner.build(number, tensors)
        variants = [_forward(runner, layer, hidden) for hidden in variants]
        stats, following = _observe(runner, layer, original, num_rows)
        for name, (modules, inputs) in _units(runner, number, layer, plan).items():
            items = [item for item in unit.items if item.linear is not None and item.linear.module in modules]
            rounded, errors = _round(items, tensors, {m: stats[g] for m, g in inputs.items()}, recipe, schemes)
            changed = runner.build(number, tensors | rounded)
            absmax = {module: stats[group].absmax for module, group in inputs.items()}
            changed = with_rounded_inputs(runner, number, changed, dict.fromkeys(modules, own), absmax)
            variants.append(_forward(runner, changed, original))
            bits = {scheme: layer_bits(items, recipe, scheme) for scheme in schemes}
            choices = tuple(Choice(s, bits[s], errors[s] / errors[own_candidate(recipe)]) for s in schemes)
            weights = sum(item.spec.numel for item in items)
            units.append(Sensitivity(f"{unit.name}.{name}", tuple(modules), weights, choices))
        original = following
    found = _divergences(checkpoint, runner, original, variants, progress)
    return [_scaled(unit, kl) for unit, kl in zip(units, found, strict=True)]


def _scaled(unit: Sensitivity, kl: float) -> Sensitivity:
    return replace(unit, choices=tuple(replace(choice, kl=choice.kl * kl) for choice in unit.choices))


def _units(runner: Runner, index: int, layer: Any, plan: Plan) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Unit -> its modules, and the input group of each.

    The experts of a block are one: engines that stack them, as vLLM does, have one scheme for all of a stack and of the
    next.
    """
    units: dict[str, tuple[list[str], dict[str, str]]] = {}
    for group in runner.groups(index, layer):
        for module in group.modules:
            if module in plan.schemes:
                modules, inputs = units.setdefault(_unit_of(module, group.name), ([], {}))
                modules.append(module)
                inputs[module] = group.name
    return units


def _unit_of(module: str, group: str) -> str:
    if EXPERT.search(module):
        return "experts"
    return group.replace("experts.", "shared_experts.", 1) if group.startswith("experts.") else group


def _observe(runner: Runner, layer: Any, hidden: Tensor, num_rows: int) -> tuple[dict[str, InputStats], Tensor]:
    """Statistics of the inputs of a block's layers, with some of these inputs, and its output."""
    collectors: dict[str, StatsCollector] = {}

    def record(name: str, x: Tensor) -> None:
        collectors.setdefault(name, StatsCollector(x.shape[1], x.device, num_rows=num_rows)).add(x)

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
            back = _rounded(weight, scheme, recipe)
            if len(seen.rows):  # whose rounding counts, too
                errors[spelled] += _output_error(weight, back, scheme, seen)
            else:
                errors[spelled] += gptq_loss(weight, back, seen) * signal
            if spelled == own_candidate(recipe):
                rounded[item.name] = back.to(weight.dtype)
    return rounded, errors


def _output_error(weight: Tensor, back: Tensor, scheme: QuantScheme, seen: InputStats) -> float:
    """Energy for a token of what a layer's output is off by, its input rounded as the scheme says, over kept inputs."""
    rounds = rounding_of(scheme, seen.absmax, seen.rows.device)
    inputs = seen.rows if rounds is None else rounds(seen.rows)
    off = inputs @ back.to(inputs).t() - seen.rows @ weight.to(inputs).t()
    return float(off.square_().sum(dtype=torch.float64)) / len(inputs)


def _rounded(weight: Tensor, scheme: QuantScheme, recipe: Recipe) -> Tensor:
    """A weight [N, K] rounded to nearest, float32."""
    stored = scale_dtype(recipe, weight.dtype)
    return quantize_weight(weight, scheme, recipe.search_of(scheme), scale_dtype=stored).dequantize()


def layer_bits(items: Sequence[Item], recipe: Recipe, scheme: str) -> int:
    """Bits that the unit's layers take on the disk: codes, scales and zero points."""
    total = 0
    for item in items:
        assert item.linear is not None
        format_ = make_format(recipe, parse_scheme(scheme), item.spec.dtype)
        tensors = format_.tensors(item.linear.out_features, item.linear.in_features)
        total += sum(spec.nbytes for name, spec in tensors.items() if name not in UNCOUNTED)
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

    Unit by unit, over sums so far of which none has both more bits and more KL than another. Bits are counted exactly.
    Where sums are more than STATES, the best of each STATES-th of their range goes on, and the result is still no worse
    than any one scheme for all that fits. The cheapest schemes must fit (`target_bits.bits_budget` checks that).
    """
    weights = sum(unit.weights for unit in units)
    left = sum(min(choice.bits for choice in unit.choices) for unit in units)
    most = max(left, math.floor(budget * weights))
    bits = torch.zeros(1, dtype=torch.int64)
    kl = torch.zeros(1, dtype=torch.float64)
    kept: list[Tensor] = []
    for unit in units:
        left -= min(choice.bits for choice in unit.choices)
        bits = (bits[:, None] + torch.tensor([choice.bits for choice in unit.choices])).flatten()
        kl = (kl[:, None] + torch.tensor([choice.kl for choice in unit.choices], dtype=torch.float64)).flatten()
        best = _best_sums(bits, kl, most - left)
        bits = bits[best]
        kl = kl[best]
        kept.append(best)
    chosen = {}
    state = len(kl) - 1  # the most bits, the least KL
    for unit, best in zip(reversed(units), reversed(kept), strict=True):
        state, pick = divmod(int(best[state]), len(unit.choices))
        chosen[unit.name] = unit.choices[pick].scheme
    return min([chosen, *uniform_choices(units, budget)], key=lambda schemes: expected_kl(units, schemes))


def _best_sums(bits: Tensor, kl: Tensor, most: int) -> Tensor:
    """Indices of the sums of at most `most` bits that no other beats, by their bits; thinned out to STATES."""
    order = kl.argsort(stable=True)
    order = order[bits[order].argsort(stable=True)]
    order = order[bits[order] <= most]
    least = kl[order].cummin(0).values
    order = order[torch.cat([torch.ones(1, dtype=torch.bool), kl[order][1:] < least[:-1]])]
    if len(order) <= STATES:
        return order
    slices = (bits[order] - bits[order[0]]) * STATES // (bits[order[-1]] - bits[order[0]] + 1)
    return order[torch.cat([slices[1:] != slices[:-1], torch.ones(1, dtype=torch.bool)])]


def uniform_choices(units: Sequence[Sensitivity], budget: float) -> list[dict[str, str]]:
    """One scheme for all units, each that the budget allows."""
    weights = sum(unit.weights for unit in units)
    schemes = [choice.scheme for choice in units[0].choices]
    bits = {s: sum(choice.bits for unit in units for choice in unit.choices if choice.scheme == s) for s in schemes}
    return [{unit.name: s for unit in units} for s in schemes if bits[s] <= budget * weights]


def expected_kl(units: Sequence[Sensitivity], schemes: Mapping[str, str]) -> float:
    """The sum of KL of a choice, unit -> scheme."""
    return sum(choice.kl for unit in units for choice in unit.choices if choice.scheme == schemes[unit.name])


def best_in_budget(
    planned: Prepared, calibration: Calibration, units: Sequence[Sensitivity], budget: float, progress: Progress
) -> Recipe:
    """The recipe of `choose`, or of one scheme for all where that is measured to be better.

    KLs of single units add up to that of the model only as long as they are small, so the model is measured with the
    choice as a whole, and with the best single scheme that the budget allows.
    """
    chosen = choose(units, budget)
    uniform = min(uniform_choices(units, budget), key=lambda schemes: expected_kl(units, schemes), default=chosen)
    recipes = [_with_schemes(planned.recipe, units, schemes) for schemes in (chosen, uniform)]
    if chosen == uniform:
        return recipes[0]
    kl = measure_recipes(planned, calibration, recipes, progress)
    return recipes[0] if kl[0] <= kl[1] else recipes[1]


def cheapest_for_kl(
    planned: Prepared, calibration: Calibration, units: Sequence[Sensitivity], most: float, progress: Progress
) -> Recipe:
    """The recipe of the fewest bits whose KL, as `measure_recipes` has it, is `most` nats at the most.

    Choices of budgets between the fewest bits and the most, and every single scheme for all, are measured as a whole;
    then again between the cheapest that holds and the dearest below it that doesn't, until these are 0.01 bits apart.
    Raises RecipeError where all lose more.
    """
    weights = sum(unit.weights for unit in units)
    below = sum(min(choice.bits for choice in unit.choices) for unit in units) / weights
    above = sum(max(choice.bits for choice in unit.choices) for unit in units) / weights
    choices = uniform_choices(units, above) + [choose(units, budget) for budget in _between(below, above)]
    best: tuple[float, Recipe] | None = None
    while choices:
        choices = [schemes for i, schemes in enumerate(choices) if schemes not in choices[:i]]
        recipes = [_with_schemes(planned.recipe, units, schemes) for schemes in choices]
        kls = measure_recipes(planned, calibration, recipes, progress)
        found = list(zip([_bits_of(units, schemes) / weights for schemes in choices], recipes, kls, strict=True))
        held = [(bits, recipe) for bits, recipe, kl in found if kl <= most]
        best = min([*held, *([best] if best else [])], key=lambda one: one[0], default=None)
        if best is None:
            raise RecipeError(
                f"--target-kl {most:g}: {min(kls):.4f} nats a token is the least that was found; a larger target "
                "works, or --ignore for what shall stay as it is"
            )
        above = best[0]
        below = max([below, *(bits for bits, _, kl in found if not kl <= most and bits < above)])  # NaN among them
        between = [choose(units, budget) for budget in _between(below, above)] if above - below > APART else []
        choices = [schemes for schemes in between if below < _bits_of(units, schemes) / weights < above]
    assert best is not None
    return best[1]


def _between(below: float, above: float) -> list[float]:
    """Budgets at even distances, both ends among them."""
    return [below + (above - below) * step / BUDGETS for step in range(BUDGETS + 1)]


def _bits_of(units: Sequence[Sensitivity], schemes: Mapping[str, str]) -> int:
    return sum(choice.bits for unit in units for choice in unit.choices if choice.scheme == schemes[unit.name])


def measure_recipes(
    planned: Prepared, calibration: Calibration, recipes: Sequence[Recipe], progress: Progress
) -> list[float]:
    """Mean KL of the model, its weights rounded to nearest and inputs as each recipe says, over the first MAX_TOKENS.

    The recipes differ in the schemes of layers alone, so that a weight is rounded once with each scheme.
    """
    checkpoint = planned.checkpoint
    runner = calibration.runner
    original = _first_hidden(checkpoint, calibration)
    variants = [original] * len(recipes)
    blocks = [unit for unit in planned.plan.units if unit.index is not None]
    for number, unit in enumerate(blocks):
        progress(number, len(blocks), f"choice in {unit.name}")
        tensors = {item.name: item.file.read(item.name) for item in unit.items}
        absmax, following = _ranges(runner, number, tensors, original, recipes)
        known: dict[tuple[str, QuantScheme], Tensor] = {}  # recipes differ in few of their schemes
        for i, recipe in enumerate(recipes):
            rounded = {}
            schemes: dict[str, QuantScheme] = {}
            for item in unit.items:
                linear = item.linear
                scheme = None if linear is None else recipe.scheme_of(linear.module, linear.kind)
                if linear is not None and scheme is not None:
                    schemes[linear.module] = scheme
                    key = item.name, scheme
                    if key not in known:
                        weight = tensors[item.name]
                        known[key] = _rounded(weight, scheme, recipe).to(weight.dtype)
                    rounded[item.name] = known[key]
            changed = runner.build(number, tensors | rounded)
            changed = with_rounded_inputs(runner, number, changed, schemes, absmax)
            variants[i] = _forward(runner, changed, variants[i])
        original = following
    return _divergences(checkpoint, runner, original, variants, progress)


def _ranges(
    runner: Runner, number: int, tensors: Mapping[str, Tensor], hidden: Tensor, recipes: Sequence[Recipe]
) -> tuple[dict[str, Tensor], Tensor]:
    """The largest magnitudes of each linear layer's input, [K] by module, where a scheme needs them; the output."""
    layer = runner.build(number, tensors)
    rounded = [scheme.activation for recipe in recipes for scheme in recipe.schemes]
    if not any(activation is not None and activation.has_stored_scale for activation in rounded):
        return {}, _forward(runner, layer, hidden)
    seen: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        largest = x.abs().amax(0).float()
        seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

    output = _forward(runner, layer, hidden, record)
    groups = runner.groups(number, layer)
    return {module: seen[group.name] for group in groups if group.name in seen for module in group.modules}, output


def _first_hidden(checkpoint: Checkpoint, calibration: Calibration) -> Tensor:
    """The first block's input over the first MAX_TOKENS of the text."""
    token_ids = calibration.token_ids
    samples = token_ids[: max(1, MAX_TOKENS // token_ids.shape[1])]
    return calibration.runner.embed(samples, checkpoint.tensor(calibration.runner.embedding_name))


def _with_schemes(recipe: Recipe, units: Sequence[Sensitivity], chosen: Mapping[str, str]) -> Recipe:
    """The recipe with the scheme of each unit's layers that was chosen."""
    layers = {module: chosen[unit.name] for unit in units for module in unit.modules}
    counted = [chosen[unit.name] for unit in units for _ in unit.modules]
    most = max(dict.fromkeys(counted), key=counted.count)
    return msgspec.structs.replace(
        recipe, scheme=most, layers={m: s for m, s in layers.items() if s != most} | dict(recipe.layers)
    )
