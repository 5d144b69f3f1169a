"""Mixed precision: the choice is the best there is within its bits, and never worse than one scheme for all."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
from calibrated import calibration, held_out_tokens
from safetensors.torch import load_file, save_file
from served import logits_of
from torch import Tensor

from octavo.calibration.budget import (
    best_in_budget,
    by_layer,
    choose,
    expected_kl,
    measure_recipes,
    uniform_choices,
    with_schemes,
)
from octavo.calibration.candidates import candidates
from octavo.calibration.experts import cautious
from octavo.calibration.prepare import Calibration, prepare
from octavo.calibration.progress import silent
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe, RecipeError, means_layer, parse_scheme
from octavo.calibration.sensitivity import Choice, Sensitivity, measure

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


@pytest.mark.parametrize(
    "scheme", ["NVFP4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("NVFP4A16", "MXFP4", "MXFP4A16"))]
)
def test_floats_of_four_and_eight_bits_share_a_budget(fixtures: Path, tmp_path: Path, scheme: str) -> None:
    """What is measured is what is served, inputs rounded; and the choice, served, is no worse than one scheme."""
    model = fixtures / "tiny"
    tokens = held_out_tokens(model, num_samples=16)
    ready = calibration(model, tokens)
    planned = prepare(model, tmp_path / "out", Recipe(scheme, "rtn"), calibration=ready)
    units = measure(planned, ready, candidates(planned.recipe), silent)
    mixed = best_in_budget(planned, ready, units, 6.0, silent)
    chosen = {unit.name: mixed.layers.get(unit.modules[0], mixed.scheme) for unit in units}
    assert len(set(chosen.values())) > 1
    assert total_bits(units, chosen) <= 6.0 * sum(unit.weights for unit in units)
    recipes = [mixed, *(Recipe(next(iter(one.values())), "rtn") for one in uniform_choices(units, 6.0))]
    assert len(recipes) > 1
    truth = logits_of(model, tokens).log_softmax(-1)
    served = [kl_of(recipe, model, tmp_path / f"{i}", ready, tokens, truth) for i, recipe in enumerate(recipes)]
    assert served[0] < min(served[1:])
    assert measure_recipes(planned, ready, recipes, silent) == pytest.approx(served, rel=0.1)


def kl_of(recipe: Recipe, model: Path, out: Path, ready: Calibration, tokens: Tensor, truth: Tensor) -> float:
    quantize_model(prepare(model, out, recipe, calibration=ready if recipe.needs_data else None))
    found = logits_of(out, tokens).log_softmax(-1)
    return float((truth.exp() * (truth - found)).sum(-1).mean())


def test_a_unit_s_output_is_off_by_its_input_s_rounding_too(fixtures: Path, tmp_path: Path) -> None:
    """Of the same weights: NVFP4A16 leaves inputs as they are."""
    model = fixtures / "tiny"
    ready = calibration(model, held_out_tokens(model, num_samples=4))
    planned = prepare(model, tmp_path / "out", Recipe("NVFP4", "rtn"), calibration=ready)
    units = measure(planned, ready, ["NVFP4", "NVFP4A16"], silent)
    for unit in units:
        rounded, plain = unit.choices
        assert rounded.bits == plain.bits == 4.5 * unit.weights
        assert rounded.kl > 1.3 * plain.kl


def test_experts_of_a_block_get_one_scheme(fixtures: Path, tmp_path: Path) -> None:
    """vLLM refuses a mixture with another scheme for down than for gate and up."""
    model = fixtures / "tiny-moe"
    ready = calibration(model, held_out_tokens(fixtures / "tiny", num_samples=2))
    planned = prepare(model, tmp_path / "out", Recipe("W4A16@32", "rtn"), calibration=ready)
    units = {unit.name: unit.modules for unit in measure(planned, ready, SCHEMES, silent)}
    every = [module for module in planned.plan.schemes if ".experts." in module and ".layers.0." in module]
    assert sorted(units["model.layers.0.experts"]) == sorted(every)
    assert sorted(module for modules in units.values() for module in modules) == sorted(planned.plan.schemes)


def never_choosing(expert: int, model: Path, copy: Path) -> Path:
    """A copy of a mixture of four whose routers choose one and never this: its score is the mean of the others'."""
    copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            others = [row for row in range(4) if row != expert]
            tensors[name][expert] = tensors[name][others].mean(0)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_each_expert_gets_a_scheme_by_the_tokens_it_sees(fixtures: Path, tmp_path: Path) -> None:
    """Of the same budget the choice of experts is no worse than that of layers, and it is served as it is written."""
    model = fixtures / "tiny-moe"
    tokens = held_out_tokens(fixtures / "tiny", num_samples=16)
    ready = calibration(model, tokens)
    planned = prepare(model, tmp_path / "out", Recipe("W4A16@32", "rtn"), calibration=ready)
    units = measure(planned, ready, SCHEMES, silent, each_expert=True)
    names = {unit.name for unit in units}
    assert {f"model.layers.{layer}.experts.{expert}" for layer in range(2) for expert in range(4)} < names
    together = measure(planned, ready, SCHEMES, silent)
    for one, summed in zip(together, by_layer(units), strict=True):
        assert (one.name, sorted(one.modules), one.weights) == (summed.name, sorted(summed.modules), summed.weights)
        of_own = [next(c.kl for c in unit.choices if c.scheme == "W4A16@32") for unit in (one, summed)]
        assert of_own[0] == pytest.approx(of_own[1], rel=1e-9)
    budget = 4.0  # between the bits of W3A16@32, 3.5, and those of W4A16@32, 4.5: not all experts can have four bits
    schemes = choose(units, budget)
    mixed = with_schemes(planned.recipe, units, schemes)
    assert len({schemes[name] for name in names if ".experts." in name}) > 1
    assert expected_kl(units, schemes) <= expected_kl(by_layer(units), choose(by_layer(units), budget))
    truth = logits_of(model, tokens).log_softmax(-1)
    served = kl_of(mixed, model, tmp_path / "mixed", ready, tokens, truth)
    assert measure_recipes(planned, ready, [mixed], silent)[0] == pytest.approx(served, rel=0.1)


def test_an_expert_that_the_text_hardly_reaches_is_safe(fixtures: Path, tmp_path: Path) -> None:
    """It counts as an even share of the tokens, and loses no more than by the best scheme for all."""
    model = never_choosing(2, fixtures / "tiny-moe", tmp_path / "model")
    ready = calibration(model, held_out_tokens(fixtures / "tiny", num_samples=16))
    planned = prepare(model, tmp_path / "out", Recipe("W4A16@32", "rtn"), calibration=ready)
    units = measure(planned, ready, SCHEMES, silent, each_expert=True)
    rare = [unit for unit in units if unit.is_rare]
    assert [unit.name for unit in rare] == ["model.layers.0.experts.2", "model.layers.1.experts.2"]
    for unit in rare:
        assert all(choice.kl > 0 for choice in unit.choices)
    free = [replace(unit, is_rare=False) for unit in units]
    for budget in (4.5, 5.0, 6.0):
        uniform = min(uniform_choices(units, budget), key=lambda schemes: expected_kl(units, schemes))
        chosen = choose(units, budget)
        for unit in rare:
            kl = {choice.scheme: choice.kl for choice in unit.choices}
            assert kl[chosen[unit.name]] <= kl[uniform[unit.name]]
        assert expected_kl(units, choose(free, budget)) <= expected_kl(units, chosen) <= expected_kl(units, uniform)
    assert "model.layers.0.experts: 2; model.layers.1.experts: 2" in cautious([unit.name for unit in rare])


def test_a_recipe_of_names_and_patterns_says_each_layer_s_scheme() -> None:
    """By the rule itself: the first that matches holds."""
    layers = {
        "a.layers.0.mlp.experts.1.up": "W8A16@32",
        "*.experts.1.*": "W3A16@32",
        "up": "none",
        "re:.*layers.1.*": "W2A16@32",
        "mlp.experts.*.down": "W4A16@64",
        "a.layers.1.q": "W8A16@64",
    }
    recipe = Recipe("W4A16@32", layers=layers)
    modules = [f"a.layers.{i}.mlp.experts.{e}.{n}" for i in range(2) for e in range(3) for n in ("up", "down")]
    kinds = {module: f"mlp.experts.*.{module.rpartition('.')[2]}" for module in modules} | {"a.layers.1.q": "q"}
    found = recipe.schemes_of(kinds)
    for module, kind in kinds.items():
        spelled = next((s for p, s in layers.items() if means_layer(p, module, kind)), recipe.scheme)
        assert found[module] == (None if spelled == "none" else parse_scheme(spelled)), module


def test_candidates_begin_with_the_recipe_s_own_scheme() -> None:
    assert candidates(Recipe("W4A16@64"), 4.5) == ["W3A16@64", "W4A16@64", "W4A16@32", "W8A16@64"]
    assert candidates(Recipe("nvfp4")) == ["NVFP4", "FP8_DYNAMIC"]
    assert candidates(Recipe("MXFP4A16"), 3.0) == ["MXFP4A16", "NVFP4A16", "MXFP8A16"]
    with pytest.raises(RecipeError, match="chooses among schemes around 4 bits, not W8A8; W4A16 and W4A16_ASYM begin"):
        candidates(Recipe("W8A8"))
