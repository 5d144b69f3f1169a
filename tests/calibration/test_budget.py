"""Mixed precision: the choice is the best there is within its bits, and never worse than one scheme for all."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from calibrated import calibration, held_out_tokens

from octavo.calibration.budget import (
    Choice,
    Sensitivity,
    best_in_budget,
    choose,
    expected_kl,
    measure,
    measure_recipes,
    uniform_choices,
)
from octavo.calibration.prepare import prepare
from octavo.calibration.progress import silent
from octavo.calibration.recipe import Recipe

SCHEMES = ["W3A16@32", "W4A16@32", "W8A16@32"]


def random_units(count: int, seed: int) -> list[Sensitivity]:
    """Units of several sizes, whose every scheme takes some bits of scales too."""
    rng = random.Random(seed)
    units = []
    for i in range(count):
        weights = rng.choice([256, 384, 1056])
        kl = rng.uniform(0.001, 0.1)
        choices = [
            Choice(f"W{bits}", bits * weights + rng.randrange(300), kl * 4.0**-bits * rng.uniform(0.5, 2))
            for bits in (2, 3, 4, 8)
        ]
        units.append(Sensitivity(f"unit {i}", (f"m{i}",), weights, tuple(choices)))
    return units


def total_bits(units: list[Sensitivity], schemes: dict[str, str]) -> int:
    return sum(choice.bits for unit in units for choice in unit.choices if choice.scheme == schemes[unit.name])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [3.0, 4.5, 6.0])
def test_the_choice_is_the_best_of_all(seed: int, budget: float) -> None:
    units = random_units(6, seed)
    weights = sum(unit.weights for unit in units)
    every = [
        {unit.name: choice.scheme for unit, choice in zip(units, choices, strict=True)}
        for choices in itertools.product(*(unit.choices for unit in units))
    ]
    least = min(expected_kl(units, schemes) for schemes in every if total_bits(units, schemes) <= budget * weights)
    chosen = choose(units, budget)
    assert total_bits(units, chosen) <= budget * weights
    assert expected_kl(units, chosen) == pytest.approx(least, rel=1e-12)


def test_sums_that_are_thinned_out_hold_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 units, with so few sums that most choices are lost: in the budget, and no worse than uniform."""
    units = random_units(200, seed=1)
    weights = sum(unit.weights for unit in units)
    best = expected_kl(units, choose(units, 4.6))
    monkeypatch.setattr("octavo.calibration.budget.STATES", 50)
    chosen = choose(units, 4.6)
    assert total_bits(units, chosen) <= 4.6 * weights
    assert best <= expected_kl(units, chosen) <= min(expected_kl(units, u) for u in uniform_choices(units, 4.6))


@pytest.mark.parametrize("budget", [4.5, 4.5001, 4.501, 4.502, 4.51])
def test_a_budget_is_never_worse_than_one_scheme(fixtures: Path, tmp_path: Path, budget: float) -> None:
    """4.5 bits are W4A16 in groups of 32 to the bit: whatever is chosen instead has less KL, as measured."""
    model = fixtures / "tiny"
    ready = calibration(model, held_out_tokens(model))
    planned = prepare(model, tmp_path / "out", Recipe("W4A16@32", algorithm="gptq"), calibration=ready)
    units = measure(planned, ready, SCHEMES, silent)
    recipe = best_in_budget(planned, ready, units, budget, silent)
    kl = measure_recipes(planned, ready, [recipe, Recipe("W4A16@32", "rtn")], silent)
    assert kl[0] <= kl[1]
    chosen = {unit.name: recipe.layers.get(unit.modules[0], recipe.scheme) for unit in units}
    assert total_bits(units, chosen) <= budget * sum(unit.weights for unit in units)
