"""What is proven of each model type with a tiny random checkpoint of it, for tests and for docs/models.md.

`prove` raises AssertionError where something is not as it must be; what octavo refuses is told with its reason.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calibrated import calibration
from divided import Pretended
from model_numbers import NUMBERS, relative
from model_types import GROUP, TinyModel
from safetensors.torch import save_file
from torch import Tensor

from octavo.calibration.choices import Algorithm
from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.jobs.source_check import check_source
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.quant.scheme import PRESETS
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.kernel_plan import check_attention
from octavo.runtime.model.sources import CheckpointSource, LoadError
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.model.weights import load_model
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.group import ALONE
from octavo.runtime.parallel.layout import LayoutError
from octavo.runtime.vision.loading import tower_of

BOUND = 1e-4
"""Of the largest number that transformers computes: float32 in another order (see test_decoder.py's derivation)."""
GPU = Target(torch.device("cuda"), torch.bfloat16, 90)
CALIBRATED: dict[str, Algorithm] = {"W4A16": "gptq", "W8A8": "gptq"}
"""Algorithms of schemes whose weights aren't rounded to nearest here."""
UNREAD = "images are not read"
BESIDE_TOWERS = "W8A16@-1"
"""The text half's scheme where a tower is quantized, too."""


@dataclass(frozen=True)
class Proven:
    """What holds of a model type.

    architecture  its class, by config.json
    difference    the largest one between octavo's numbers and transformers', relative to the largest number
    schemes       presets that it is quantized with, reloaded and served; a tower is left as it is
    towers        presets that its tower is quantized with, reloaded and served
    refused       reasons, by what is refused
    """

    model_type: str
    architecture: str
    difference: float
    schemes: tuple[str, ...]
    towers: tuple[str, ...]
    refused: dict[str, str]


def schemes() -> dict[str, str]:
    """How each preset is spelled for sizes this small, by its name."""
    names = [name for name in PRESETS if name != "INT8"]  # W8A8 by another name
    spelled = {}
    for name in names:
        granularity = PRESETS[name].weight.granularity
        is_large = granularity.kind == "group" and granularity.group_size > GROUP
        spelled[name] = f"{name}@{GROUP}" if is_large else name
    return spelled


def prove(tiny: TinyModel, directory: Path, names: Collection[str] = schemes().keys()) -> Proven:
    """directory: an empty one, for what is written on the way. names: of presets, where not all are to be proved."""
    source = directory / "source"
    truth = tiny.write(source)
    config = json.loads((source / "config.json").read_text())
    numbers = NUMBERS[tiny.kind]
    difference = numbers.difference(source, truth)
    assert difference < BOUND, difference
    original = numbers.of(source, truth)
    refused = _refused_options(tiny, source)

    def is_served(recipes: dict[str, dict[str, Any]]) -> bool:
        """By the first of these that isn't refused; reasons of those before it are kept."""
        for what, options in recipes.items():
            try:
                out = directory / " ".join(options.values())
                recipe = Recipe(**options)
                quantize(source, out, recipe, is_decoder=tiny.is_decoder)
                _check(out, source, recipe, original, lambda one: numbers.of(one, truth))
            except (QuantizeError, RecipeError, LoadError) as error:
                refused[what] = str(error).removeprefix("towers: ")
            else:
                return True
        return False

    served = tuple(name for name in names if is_served(_recipes(tiny, name)))
    towers = tuple(name for name in names if tiny.kind == "images" and is_served(_recipes_of_towers(name)))
    return Proven(tiny.model_type, config["architectures"][0], difference, served, towers, refused)


def _recipes(tiny: TinyModel, name: str) -> dict[str, dict[str, Any]]:
    """A preset's in the order of trying, by what is refused: to nearest where a model can't be calibrated."""
    nearest = {"scheme": schemes()[name], "algorithm": "rtn"}
    if not tiny.is_decoder or name not in CALIBRATED:
        return {name: nearest}
    algorithm = CALIBRATED[name]
    return {f"--algorithm {algorithm}": nearest | {"algorithm": algorithm}, name: nearest}


def _recipes_of_towers(name: str) -> dict[str, dict[str, Any]]:
    return {f"--towers {name}": {"scheme": BESIDE_TOWERS, "algorithm": "rtn", "towers": schemes()[name]}}


def quantize(source: Path, out: Path, recipe: Recipe, *, is_decoder: bool) -> None:
    """Raises QuantizeError or LoadError where that is refused."""
    check_source(open_dequantized(source, LAYOUTS), runs_blocks=recipe.needs_data)
    ready = None
    if recipe.needs_data and is_decoder:
        ready = calibration(source, torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(4)))
    quantize_model(prepare(source, out, recipe, calibration=ready, layouts=LAYOUTS))


def _check(out: Path, source: Path, recipe: Recipe, original: Tensor, numbers: Callable[[Path], Tensor]) -> None:
    """Reload and serve.

    Where inputs aren't rounded, the served numbers are those of a plain checkpoint of what the codes stand for; where
    they are, they say more of the original's than its mean does.
    """
    found = numbers(out)
    assert found.isfinite().all()
    if any(scheme is not None and scheme.activation is not None for scheme in (recipe.default, recipe.of_towers)):
        assert (found - original).square().mean() < (original - original.mean()).square().mean()
        return
    plain = out.with_name(f"{out.name}-plain")
    shutil.copytree(source, plain)
    stands_for = open_dequantized(out, LAYOUTS)
    tensors = {tensor: stands_for.tensor(tensor).clone() for tensor in stands_for.names}
    save_file(tensors, plain / "model.safetensors")
    assert relative([found], [numbers(plain)]) < 3 * BOUND


def _refused_options(tiny: TinyModel, source: Path) -> dict[str, str]:
    """What of serving this model type doesn't have, with what octavo says."""
    model = str(source)
    divided = EngineConfig(model=model, parallel=ParallelConfig(tensor_parallel_size=2))
    asked: dict[str, Callable[[], list[str]]] = {
        "--deterministic": lambda: load_model(EngineConfig(model=model, dtype="bfloat16", deterministic=True)).notes,
        "-tp 2": lambda: load_model(divided, group=Pretended(2) if tiny.is_decoder else ALONE).notes,
    }
    if tiny.is_decoder:
        asked["--device cuda"] = lambda: _notes_of_a_gpu(source)
    reasons = {}
    for option, ask in asked.items():
        try:
            reason = next((note for note in ask() if tiny.kind == "images" and note.startswith(UNREAD)), None)
        except (LoadError, LayoutError) as error:
            reason = str(error)
        if reason is not None:
            reasons[option] = reason
    return reasons


def _notes_of_a_gpu(source: Path) -> list[str]:
    """What it would say of a model that it runs."""
    checkpoint = Checkpoint.open(source)
    check_attention(DecoderSpec.from_hf(checkpoint.config), GPU)
    config = EngineConfig(model=str(source))
    notes: list[str] = []
    tower_of(config, CheckpointSource(checkpoint), GPU.dtype, GPU.device, notes, generates=True)
    return notes
