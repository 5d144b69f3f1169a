"""The values of a recipe's fields, for types and flags, and their bounds. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

Algorithm = Literal["auto", "rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq", "tune"]
Effort = Literal["fast", "auto", "best"]
ExpertSchemes = Literal["layer", "expert"]
ActOrder = Literal["none", "static", "group"]
Format = Literal["compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "gguf"]
RotationName = Literal["R1", "R2", "R4"]
TransformType = Literal["hadamard", "random-hadamard"]
Outside = Literal["towers", "lm_head", "embedding"]
OUTSIDE: tuple[Outside, ...] = get_args(Outside)

MOST_SAMPLES = 2**20  # each of which has a seed of its own, and which no machine has the time for
