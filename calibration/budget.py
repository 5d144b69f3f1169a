"""Mixed precision under a budget: who gets how many bits.

The choice among units' schemes (sensitivity.py) is a knapsack. It is compared with the best single scheme of no more
bits, both measured as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from octavo.calibration.block import Runner
from octavo.calibration.cache_choice import WITHOUT_CACHE, CacheChoice, CacheRoom, cache_alone
from octavo.calibration.kv import KVCollector, KVError
from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import Calibration, Prepared
from octavo.calibration.progress import Progress
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.rounded_inputs import with_rounded_inputs
from octavo.calibration.sensitivity import Choice, Sensitivity, divergences, first_hidden, forward, rounded
from octavo.quant.block_map import StoredCache
from octavo.quant.scheme import KVScheme, QuantScheme

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
    planned: Prepared,
    calibration: Calibration,
    units: Sequence[Sensitivity],
    budget: float,
    progress: Progress,
    caches: Sequence[CacheChoice] = WITHOUT_CACHE,
) -> Recipe:
    """The recipe of `choose` and of the KV cache that goes best with it, or, where that is measured to be better, of
    one scheme for all experts of a layer, or of one for all.

    budget: of all that the weights and the cache take, in bits per weight. KLs of single units add up to that of the
    model only as long as they are small, so the model is measured with the choice as a whole, and with each single
    scheme and cache that the budget allows.
    """
    weights = sum(unit.weights for unit in units)
    least = sum(min(choice.bits for choice in unit.choices) for unit in units)
    together = by_layer(units)
    single: list[_Whole] = []
    of_experts: list[_Whole] = []
    of_layers: list[_Whole] = []
    for cache in caches:
        left = budget - cache.bits / weights
        if cache.bits and least > left * weights:
            continue
        single += [_Whole(schemes, cache) for schemes in uniform_choices(units, left)]
        of_experts.append(_Whole(choose(units, left), cache))
        chosen = choose(together, left)
        of_layers.append(_Whole({unit.name: chosen[unit.layer or unit.name] for unit in units}, cache))
    best = [min(found, key=lambda whole: whole.expected(units)) for found in (of_experts, of_layers)]
    wholes = [whole for i, whole in enumerate([*best, *single]) if whole not in [*best, *single][:i]]
    recipes = [whole.recipe(planned.recipe, units) for whole in wholes]
    if len(recipes) == 1:
        return recipes[0]
    kls = measure_recipes(planned, calibration, recipes, progress)
    return min(zip(kls, recipes, strict=True), key=lambda one: one[0])[1]


@dataclass(frozen=True)
class _Whole:
    """A choice for the whole model: each unit's scheme, and the KV cache."""

    schemes: Mapping[str, str]
    cache: CacheChoice

    def expected(self, units: Sequence[Sensitivity]) -> float:
        return expected_kl(units, self.schemes) + self.cache.kl

    def recipe(self, recipe: Recipe, units: Sequence[Sensitivity]) -> Recipe:
        mixed = with_schemes(recipe, units, self.schemes)
        return msgspec.structs.replace(mixed, kv_cache=self.cache.kv_cache or recipe.kv_cache)


def measure_caches(
    planned: Prepared, calibration: Calibration, cache: CacheRoom, progress: Progress
) -> list[CacheChoice]:
    """What each type of the cache costs when nothing else is rounded."""
    names = [name for name in cache.bits if name is not None]
    recipes = [cache_alone(planned.recipe, name) for name in names]
    found = measure_recipes(planned, calibration, recipes, progress) if len(cache.bits) > 1 else [0.0] * len(names)
    kls: dict[str | None, float] = {None: 0.0, **dict(zip(names, found, strict=True))}
    return [CacheChoice(name, bits, kls[name]) for name, bits in cache.bits.items()]


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

    The recipes differ in the schemes of layers and in the KV cache alone, so that a weight is rounded once with each
    scheme. Scales of a cache are those of the original's keys and values. Raises QuantizeError where there can be none.
    """
    checkpoint = planned.checkpoint
    runner = calibration.runner
    original = first_hidden(checkpoint, calibration)
    variants = [original] * len(recipes)
    blocks = [unit for unit in planned.plan.units if unit.index is not None]
    for number, unit in enumerate(blocks):
        progress(number, len(blocks), f"choice in {unit.name}")
        tensors = {item.name: item.file.read(item.name) for item in unit.items}
        absmax, caches, following = _original(runner, number, tensors, original, recipes)
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
            variants[i] = forward(runner, changed, variants[i], stored=None if recipe.kv is None else caches[recipe.kv])
        original = following
    return divergences(checkpoint, runner, original, variants, progress)


def _original(
    runner: Runner, number: int, tensors: Mapping[str, Tensor], hidden: Tensor, recipes: Sequence[Recipe]
) -> tuple[dict[str, Tensor], dict[KVScheme, StoredCache], Tensor]:
    """A block of the original: the largest magnitudes of each linear layer's input, [K] by module, where a scheme needs
    them; how keys and values are stored with each scheme of a cache; and the output.
    """
    layer = runner.build(number, tensors)
    activations = [scheme.activation for recipe in recipes for scheme in recipe.schemes]
    needs_ranges = any(activation is not None and activation.has_stored_scale for activation in activations)
    collectors = {recipe.kv: KVCollector(recipe.kv) for recipe in recipes if recipe.kv is not None}
    seen: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        largest = x.abs().amax(0).float()
        seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

    def record_kv(keys: Tensor, values: Tensor) -> None:
        for collector in collectors.values():
            collector.add(keys, values)

    output = forward(runner, layer, hidden, record if needs_ranges else None, record_kv if collectors else None)
    groups = runner.groups(number, layer)
    absmax = {module: seen[group.name] for group in groups if group.name in seen for module in group.modules}
    try:
        caches = {kv: StoredCache(kv, collector.result().scales()) for kv, collector in collectors.items()}
    except KVError as e:
        raise QuantizeError(f"block {number}: {e}") from e
    return absmax, caches, output


def with_schemes(recipe: Recipe, units: Sequence[Sensitivity], chosen: Mapping[str, str]) -> Recipe:
    """The recipe with the scheme of each unit's layers that was chosen."""
    layers = {module: chosen[unit.name] for unit in units for module in unit.modules}
    counted = [chosen[unit.name] for unit in units for _ in unit.modules]
    most = max(dict.fromkeys(counted), key=counted.count)
    return msgspec.structs.replace(
        recipe, scheme=most, layers={m: s for m, s in layers.items() if s != most} | dict(recipe.layers)
    )
