"""Mixed precision under a budget: who gets how many bits.

The choice among units' schemes (sensitivity.py) is a knapsack. It is compared with the best single scheme of no more
bits, both measured as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from octavo.calibration.block import Runner
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.rounded_inputs import with_rounded_inputs
from octavo.calibration.sensitivity import Choice, Sensitivity, divergences, first_hidden, forward, rounded
from octavo.quant.scheme import QuantScheme

STATES = 10_000  # of the knapsack
BUDGETS = 8  # that are measured at a time where a KL is the target
APART = 0.01  # bits per weight between budgets that are told apart there


def choose(units: Sequence[Sensitivity], budget: float) -> dict[str, str]:
    """Unit -> scheme: the least sum of KL with at most `budget` bits per weight on average.

    Unit by unit, over sums so far of which none has both more bits and more KL than another. Bits are counted exactly.
    Where sums are more than STATES, the best of each STATES-th of their range goes on, and the result is still no worse
    than any one scheme for all that fits. The cheapest schemes must fit (`target_bits.bits_budget` checks that). An
    expert that the text says next to nothing of gets what loses no more than the best single scheme that fits would.
    """
    uniform = min(uniform_choices(units, budget), key=lambda schemes: expected_kl(units, schemes), default={})
    units = [_safe(unit, uniform[unit.name]) if unit.is_rare and uniform else unit for unit in units]
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
    return min([chosen, *([uniform] if uniform else [])], key=lambda schemes: expected_kl(units, schemes))


def _safe(unit: Sensitivity, scheme: str) -> Sensitivity:
    """The unit without what loses more than a scheme does."""
    most = next(choice.kl for choice in unit.choices if choice.scheme == scheme)
    return replace(unit, choices=tuple(choice for choice in unit.choices if choice.kl <= most))


def by_layer(units: Sequence[Sensitivity]) -> list[Sensitivity]:
    """The units with all experts of a layer as one."""
    members: dict[str, list[Sensitivity]] = {}
    for unit in units:
        members.setdefault(unit.layer or unit.name, []).append(unit)
    return [_together(name, of_layer) for name, of_layer in members.items()]


def _together(name: str, units: Sequence[Sensitivity]) -> Sensitivity:
    """Units as one that has one scheme for all."""
    choices = tuple(
        Choice(of_scheme[0].scheme, sum(one.bits for one in of_scheme), sum(one.kl for one in of_scheme))
        for of_scheme in zip(*(unit.choices for unit in units), strict=True)
    )
    modules = tuple(module for unit in units for module in unit.modules)
    return Sensitivity(name, modules, sum(unit.weights for unit in units), choices)


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
    """The recipe of `choose`, or of one scheme for all or for a layer's experts where that is measured to be better.

    KLs of single units add up to that of the model only as long as they are small, so the model is measured with the
    choice as a whole, and with the best single scheme that the budget allows.
    """
    together = by_layer(units)
    chosen = choose(units, budget)
    of_layers = choose(together, budget)
    uniform = min(uniform_choices(units, budget), key=lambda schemes: expected_kl(units, schemes), default=chosen)
    choices = [chosen, {unit.name: of_layers[unit.layer or unit.name] for unit in units}, uniform]
    choices = [schemes for i, schemes in enumerate(choices) if schemes not in choices[:i]]
    recipes = [with_schemes(planned.recipe, units, schemes) for schemes in choices]
    if len(recipes) == 1:
        return recipes[0]
    kls = measure_recipes(planned, calibration, recipes, progress)
    return min(zip(kls, recipes, strict=True), key=lambda one: one[0])[1]


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
        recipes = [with_schemes(planned.recipe, units, schemes) for schemes in choices]
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
    original = first_hidden(checkpoint, calibration)
    variants = [original] * len(recipes)
    blocks = [unit for unit in planned.plan.units if unit.index is not None]
    for number, unit in enumerate(blocks):
        progress(number, len(blocks), f"choice in {unit.name}")
        tensors = {item.name: item.file.read(item.name) for item in unit.items}
        absmax, following = _ranges(runner, number, tensors, original, recipes)
        known: dict[tuple[str, QuantScheme], Tensor] = {}  # recipes differ in few of their schemes
        kinds = {item.linear.module: item.linear.kind for item in unit.items if item.linear is not None}
        for i, recipe in enumerate(recipes):
            changes = {}
            schemes = {module: s for module, s in recipe.schemes_of(kinds).items() if s is not None}
            for module, scheme in schemes.items():
                key = f"{module}.weight", scheme
                if key not in known:
                    weight = tensors[key[0]]
                    known[key] = rounded(weight, scheme, recipe).to(weight.dtype)
                changes[key[0]] = known[key]
            changed = runner.build(number, tensors | changes)
            changed = with_rounded_inputs(runner, number, changed, schemes, absmax)
            variants[i] = forward(runner, changed, variants[i])
        original = following
    return divergences(checkpoint, runner, original, variants, progress)


def _ranges(
    runner: Runner, number: int, tensors: Mapping[str, Tensor], hidden: Tensor, recipes: Sequence[Recipe]
) -> tuple[dict[str, Tensor], Tensor]:
    """The largest magnitudes of each linear layer's input, [K] by module, where a scheme needs them; the output."""
    layer = runner.build(number, tensors)
    activations = [scheme.activation for recipe in recipes for scheme in recipe.schemes]
    if not any(activation is not None and activation.has_stored_scale for activation in activations):
        return {}, forward(runner, layer, hidden)
    seen: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        largest = x.abs().amax(0).float()
        seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

    output = forward(runner, layer, hidden, record)
    groups = runner.groups(number, layer)
    return {module: seen[group.name] for group in groups if group.name in seen for module in group.modules}, output


def with_schemes(recipe: Recipe, units: Sequence[Sensitivity], chosen: Mapping[str, str]) -> Recipe:
    """The recipe with the scheme of each unit's layers that was chosen."""
    layers = {module: chosen[unit.name] for unit in units for module in unit.modules}
    counted = [chosen[unit.name] for unit in units for _ in unit.modules]
    most = max(dict.fromkeys(counted), key=counted.count)
    return msgspec.structs.replace(
        recipe, scheme=most, layers={m: s for m, s in layers.items() if s != most} | dict(recipe.layers)
    )
