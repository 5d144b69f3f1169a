"""Runs of `octavo quantize` on tiny models, and what they are told of: text, commands, files."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.runtime.model.families.registry import LAYOUTS


def written(model: Path, out: Path, **how: Any) -> dict[str, Tensor]:
    """The tensors of a copy whose blocks are rounded to four bits; how: further fields of the recipe."""
    recipe = Recipe("W4A16@32", algorithm="rtn", **how)
    quantize_model(prepare(model, out, recipe, layouts=LAYOUTS))
    return load_file(out / "model.safetensors")


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def write_text(path: Path) -> Path:
    """Documents for some ten thousand tokens."""
    words = "The quick brown fox jumps over the lazy dog while forty two files are opened, read and closed again. "
    path.write_text("\n\n".join(f"{i}. {words * (i % 5 + 1)}" for i in range(200)))
    return path


def tuning(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    """The command that tunes a copy on three batches of text."""
    return [
        *(sys.executable, "-m", "octavo", "quantize", str(model), "-o", str(out), "--dataset", str(text)),
        *("--scheme", "W4A16", "--group-size", "32", "--algorithm", "tune", "--self-generated-samples", "0"),
        *("--num-calibration-samples", "48", "--max-seq-length", "128", "--no-eval", *more),
    ]
