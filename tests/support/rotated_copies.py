"""Checkpoints that are rotated and nothing else, written by the safetensors package."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from octavo.calibration.recipe import Recipe
from octavo.jobs.rotated_source import rotated_source
from octavo.quant.dequantized import open_dequantized
from octavo.runtime.model.families.registry import LAYOUTS


def rotated_copy(source: Path, into: Path, recipe: Recipe) -> Path:
    """The original as the recipe's rotations make it, before anything is rounded."""
    checkpoint = rotated_source(open_dequantized(source, LAYOUTS), recipe, [])
    into.mkdir()
    (into / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    for name, tensor in tensors.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (checkpoint.spec(name).dtype, checkpoint.spec(name).shape)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into
