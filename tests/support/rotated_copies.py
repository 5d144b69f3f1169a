"""Checkpoints that are rotated and nothing else, written by the safetensors package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from octavo.calibration.recipe import Recipe
from octavo.jobs.rotated_source import rotated_source
from octavo.quant.dequantized import open_dequantized
from octavo.runtime.model.families.registry import LAYOUTS


def rotated_copy(source: Path, into: Path, recipe: Recipe) -> Path:
    """The original as the recipe's rotations make it, before anything is rounded."""
    checkpoint = rotated_source(open_dequantized(source, LAYOUTS), recipe, [])
    into.mkdir()
    config = checkpoint.config
    if checkpoint.transforms:
        config = config | {"quantization_config": unquantized(checkpoint.transforms.to_config())}
    (into / "config.json").write_text(json.dumps(config))
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    for name, tensor in tensors.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (checkpoint.spec(name).dtype, checkpoint.spec(name).shape)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


def unquantized(transform_config: dict[str, Any]) -> dict[str, Any]:
    """compressed-tensors' config of a model that is transformed and not quantized."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "quantization_status": "compressed",
        "transform_config": transform_config,
    }
