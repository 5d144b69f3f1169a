"""Towers whose linear layers are quantized: what the decoder's kernels make of an image, in how many bytes."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from asked_images import request_of
from slow_cases import slow
from tiny_vision import TinyVision, make_tiny_vision, picture
from torch import Tensor

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.commands.inspect import inspect
from octavo.kernels.native.cpu_features import has_dot_products
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.startup import load_engine
from octavo.runtime.vision.linears import TowerLinear, spellings

FIRST = picture(1, 50, 37)


@pytest.fixture(scope="module", params=["llava", *map(slow, ("qwen2_5_vl", "gemma3", "gemma4", "llama4", "smolvlm"))])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyVision:
    return make_tiny_vision(request.param, tmp_path_factory.mktemp(request.param))


def engine_of(directory: Path, dtype: str) -> Any:
    config = EngineConfig(model=str(directory), dtype=dtype, num_blocks=200, block_size=4, max_model_len=200)
    return load_engine(config, time.time())[0]


def quantized(tiny: TinyVision, scheme: str, directory: Path) -> Checkpoint:
    recipe = Recipe("W8A16@-1", towers=scheme)
    quantize_model(prepare(tiny.directory, directory, recipe, layouts=LAYOUTS))
    return Checkpoint.open(directory, LAYOUTS)


def module_of(name: str, checkpoint: Checkpoint) -> str:
    """A tower's layer as the checkpoint calls it."""
    (found,) = (one for one in checkpoint.quantized if one in spellings(name))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_products_of_an_image(dtype: str, tiny: TinyVision, tmp_path: Path) -> None:
    """Each layer's are those of the dequantized weights, within half a step of each input and the output's rounding.

    In float32 they are those of inputs rounded by the scheme's formula, but for one that lies between two steps.
    """
    checkpoint = quantized(tiny, "W8A8", tmp_path / "out")
    engine = engine_of(tmp_path / "out", dtype)
    tower = engine.worker.model.tower
    layers = {name: layer for name, layer in tower.module.named_modules() if isinstance(layer, TowerLinear)}
    assert layers.keys() == tower.linears.keys()
    assert len(layers) == sum("vision" in name or "visual" in name for name in checkpoint.quantized)
    calls: dict[TowerLinear, tuple[Tensor, Tensor]] = {}
    for layer in layers.values():
        layer.register_forward_hook(lambda layer, args, out: calls.update({layer: (args[0].float(), out.float())}))
    (image,) = request_of(tiny, engine, [FIRST]).images
    with torch.inference_mode():
        tower.module(tower._seen(image))
    for name, layer in layers.items():
        x, out = (tensor.flatten(0, -2) for tensor in calls[layer])
        weight = checkpoint.linear(module_of(name, checkpoint)).dequantize()
        bias = 0 if layer.linear.whole_bias is None else layer.linear.whole_bias.float()
        step = x.abs().amax(1, keepdim=True) / 127.5
        whole = x @ weight.T + bias
        allowed = step * (0.5 + 2**-8) * weight.abs().sum(1) + 2**-7 * whole.abs() + 1e-6
        assert ((out - whole).abs() <= allowed).all(), name
        if dtype == "float32":
            rounded = (x / step).round().clamp(-128, 127) * step @ weight.T + bias
            assert ((out - rounded).abs() <= step * weight.abs().amax(1) + 1e-5).all(), name


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8@16"])
@pytest.mark.parametrize("tiny", ["llava"], indirect=True)
def test_a_tower_takes_as_many_bytes_as_its_codes(scheme: str, tiny: TinyVision, tmp_path: Path) -> None:
    """But for scales, and rows that fill a kernel's tile."""
    quantized(tiny, scheme, tmp_path / "out")
    before, after = (
        engine_of(directory, "bfloat16").worker.model.tower for directory in (tiny.directory, tmp_path / "out")
    )
    parts = [part for linear in after.linears.values() for part in linear.parts]
    if any(part.choice.kernel.dequantizes for part in parts):
        pytest.skip("this processor has no such products")
    numbers = sum(layer.weight.numel() for name, layer in before.module.named_modules() if name in after.linears)
    assert 2 * numbers > before.weight_bytes - after.weight_bytes > numbers / 2


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16@16"])
@pytest.mark.parametrize("tiny", ["llava"], indirect=True)
def test_inspect_names_the_kernels_that_are_loaded(scheme: str, tiny: TinyVision, tmp_path: Path) -> None:
    """Of each kind of layer, with its reason; and what departs from the checkpoint is told at start."""
    checkpoint = quantized(tiny, scheme, tmp_path / "out")
    model = engine_of(tmp_path / "out", "bfloat16").worker.model
    rows = inspect(checkpoint, "cpu")["layers"]
    loaded = {}
    for name, linear in model.tower.linears.items():
        (part,) = linear.parts
        kind = re.sub(r"\.\d+(?=\.)", ".*", module_of(name, checkpoint))
        loaded[kind] = (part.choice.kernel.name, part.choice.reason)
    assert loaded == {
        row["kind"]: (row["kernel"], row["reason"]) for row in rows if "vision" in row["kind"] and row["kernel"]
    }
    listed = {kernel for name, _, kernel in model.report_layers() if name.startswith("vision_tower")}
    assert listed == {kernel for kernel, _ in loaded.values()}
    departing = {reason for kernel, reason in loaded.values() if "dequantized" in kernel}
    assert departing <= set(model.notes)
    says = {"FP8_DYNAMIC": "inputs stay as they are, which is faster", "W4A16@16": "torch multiplies the many tokens"}
    if scheme in says and has_dot_products():
        assert departing
        assert all(says[scheme] in reason for reason in departing)
