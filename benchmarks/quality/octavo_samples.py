"""octavo on given samples: `python octavo_samples.py MODEL SAMPLES.pt OUT SCHEME HOW`; nothing is measured.

HOW: an effort (fast, auto, best) or an algorithm.
"""

from __future__ import annotations

import sys
from typing import get_args

import torch

import octavo
from octavo.calibration.choices import Effort
from octavo.calibration.recipe import Recipe
from octavo.quant.scheme import GGUF, GGUF_MIXES


def main() -> None:
    """Quantize."""
    model, samples, out, scheme, how = sys.argv[1:6]
    algorithm, effort = ("auto", how) if how in get_args(Effort) else (how, "auto")
    is_gguf = scheme in GGUF or scheme in GGUF_MIXES
    recipe = Recipe(scheme, algorithm, "gguf" if is_gguf else "compressed-tensors")
    data = torch.load(samples) if recipe.resolved(effort).needs_data else None
    octavo.quantize(model, out, recipe=recipe, effort=effort, data=data, evaluate=False, overwrite=True)


if __name__ == "__main__":
    main()
