"""Targets of mixed precision: what is written holds them, on the disk, as counted and as measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from calibrated import calibration, held_out_tokens
from safetensors.torch import load_file

import octavo
from octavo.calibration.budget import cheapest_for_kl, measure_recipes
from octavo.calibration.prepare import prepare
from octavo.calibration.progress import silent
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.sensitivity import measure
from octavo.calibration.target import in_gb, parse_speed

SCHEMES = ["W3A16@32", "W4A16@32", "W8A16@32"]


def quantized(model: Path, out: Path, text: Path, **options: Any) -> Path:
    how = {"data": str(text), "num_calibration_samples": 4, "max_seq_length": 64, "evaluate": False, "overwrite": True}
    octavo.quantize(model, out, scheme="W4A16@32", **how, **options)
    return out / "model.safetensors"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Sentence {i} is about {i * i}, which is {i} times {i}." for i in range(60)))
    return path


def test_a_size_is_that_of_the_file(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """Whatever fits goes into it: the next larger size has another choice."""
    model = fixtures / "tiny"
    least = least_of(model, tmp_path, text, target_size=100_000)
    smallest = octavo.flags.parse_size(least)
    targets = (smallest, 750_000)
    sizes = [quantized(model, tmp_path / "out", text, target_size=most).stat().st_size for most in targets]
    assert sizes[0] <= smallest < sizes[0] * 1.02  # headers are counted larger than they are
    assert 730_000 < sizes[1] <= 750_000


def least_of(model: Path, tmp_path: Path, text: Path, **target: float) -> str:
    """What the error names as reachable."""
    with pytest.raises(RecipeError) as raised:
        quantized(model, tmp_path / "none", text, **target)
    found = re.search(r"the smallest schemes (?:make|are) (\S+?)x?(?: as fast.*)?; a target", str(raised.value))
    assert found is not None, raised.value
    return found[1]


def test_a_speed_is_that_of_the_bytes_that_a_token_needs(fixtures: Path, tmp_path: Path, text: Path) -> None:
    model = fixtures / "tiny"
    fastest = float(least_of(model, tmp_path, text, target_speed=16.0))
    before = read_bytes(model / "model.safetensors")
    for speed in (fastest, 1.5):
        after = read_bytes(quantized(model, tmp_path / "out", text, target_speed=speed))
        assert speed <= before / after
    assert before / after < 2.2  # the slower one uses its room


def read_bytes(path: Path) -> int:
    tensors = load_file(path)
    unread = {"model.embed_tokens.weight"} if any(name.startswith("lm_head.") for name in tensors) else set()
    return sum(t.nbytes for name, t in tensors.items() if name not in unread and not name.endswith("weight_shape"))


def test_a_quantized_head_counts(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """As the bytes that it takes, and as those of the embedding that it was tied to before."""
    model = fixtures / "tiny-qwen2"
    path = quantized(model, tmp_path / "size", text, target_size=750_000, lm_head="W8A16@32")
    assert 730_000 < path.stat().st_size <= 750_000
    before = read_bytes(model / "model.safetensors")
    after = read_bytes(quantized(model, tmp_path / "speed", text, target_speed=2.2, lm_head="W8A16@32"))
    assert 2.2 <= before / after < 2.4


def test_a_kl_is_held_with_fewer_bits_than_any_single_scheme(fixtures: Path, tmp_path: Path) -> None:
    """The target lies between those of two single schemes, and so do the bits."""
    model = fixtures / "tiny"
    ready = calibration(model, held_out_tokens(model))
    planned = prepare(model, tmp_path / "out", Recipe("W4A16@32", algorithm="gptq"), calibration=ready)
    units = measure(planned, ready, SCHEMES, silent)
    weights = sum(unit.weights for unit in units)
    single = measure_recipes(planned, ready, [Recipe(scheme) for scheme in SCHEMES], silent)
    target = (single[1] * single[2]) ** 0.5
    recipe = cheapest_for_kl(planned, ready, units, target, silent)
    assert measure_recipes(planned, ready, [recipe], silent)[0] <= target
    chosen = {unit.name: recipe.layers.get(unit.modules[0], recipe.scheme) for unit in units}
    bits = sum(c.bits for unit in units for c in unit.choices if c.scheme == chosen[unit.name])
    assert 4.5 < bits / weights < 8.5
    with pytest.raises(RecipeError, match=f"{single[2]:.4f} nats a token is the least that was found"):
        cheapest_for_kl(planned, ready, units, single[2] / 2, silent)


def test_blocks_of_gguf_files_are_not_chosen(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """They have no 3 bits and no 8 in groups of 64, and their files' sizes are others."""
    with pytest.raises(RecipeError, match="--target-size chooses among W3A16 to W8A16, and format gguf has schemes of"):
        quantized(fixtures / "tiny", tmp_path / "out", text, target_size=800_000, format="gguf")


def test_one_target_decides(fixtures: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(RecipeError, match=r"--bits-budget 4\.5 and --target-kl 0\.1 are several targets"):
        quantized(fixtures / "tiny", tmp_path / "out", text, bits_budget=4.5, target_kl=0.1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"target_size": float("nan")}, "--target-size nan: a number above 0 is needed"),
        ({"target_speed": 1.0}, r"--target-speed 1\.0: a number above 1 is needed"),
        ({"target_kl": float("inf")}, "--target-kl inf: a number above 0 is needed"),
        ({"bits_budget": 0}, "--bits-budget 0: a number above 0 is needed"),
    ],
)
def test_a_target_is_a_number(
    fixtures: Path, tmp_path: Path, text: Path, target: dict[str, float], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        quantized(fixtures / "tiny", tmp_path / "out", text, **target)


def test_a_target_chooses_every_scheme(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """Schemes that a recipe names would be neither held nor counted; layers that it keeps are both."""
    model = fixtures / "tiny"
    with pytest.raises(
        RecipeError, match=r"--target-size chooses each layer's scheme, and layers has one for \*\.o_proj"
    ):
        quantized(model, tmp_path / "out", text, target_size=800_000, layers={"*.o_proj": "W8A16@32"})
    written = quantized(model, tmp_path / "out", text, target_size=800_000, layers={"*.o_proj": "none"})
    assert written.stat().st_size <= 800_000
    assert "model.layers.0.self_attn.o_proj.weight" in load_file(written)


@pytest.mark.parametrize(("size", "spelled"), [(3.2e9, "3.2GB"), (123_456_789, "123.5MB"), (999, "0.999KB")])
def test_a_size_that_is_named_is_no_smaller(size: float, spelled: str) -> None:
    assert in_gb(size) == spelled
    assert octavo.flags.parse_size(spelled) >= size


@pytest.mark.parametrize("spelled", ["1x", "0.5", "fast", "100 tokens/s", ""])
def test_a_speed_is_a_ratio(spelled: str) -> None:
    assert parse_speed("1.8x") == parse_speed("1.8") == 1.8
    with pytest.raises(ValueError, match=r"such as 1\.8x"):
        parse_speed(spelled)
