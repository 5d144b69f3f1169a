"""A recipe's output format: how a layer is written, and what config.json says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from octavo.calibration.recipe import Recipe
from octavo.quant.formats.awq import AWQFormat, write_awq_config
from octavo.quant.formats.compressed_tensors import format_for, write_config
from octavo.quant.formats.format import QuantFormat
from octavo.quant.formats.fp8 import Fp8Format, write_fp8_config
from octavo.quant.formats.gguf import GGUFFormat, kind_of
from octavo.quant.formats.gptq import GPTQFormat, Version, write_gptq_config
from octavo.quant.scheme import QuantScheme


def make_format(recipe: Recipe, scheme: QuantScheme, dtype: torch.dtype) -> QuantFormat:
    """The format of a layer with this scheme, whose weight is of this type in the source."""
    match recipe.format:
        case "compressed-tensors":
            return format_for(scheme, scale_dtype(recipe, dtype))
        case "gptq" | "gptq_v2":
            return GPTQFormat(scheme, _version(recipe), _desc_act(recipe), scale_dtype(recipe, dtype))
        case "awq":
            return AWQFormat(scheme, scale_dtype=scale_dtype(recipe, dtype))
        case "fp8":
            return Fp8Format(scheme)
        case "gguf":
            return GGUFFormat(kind_of(scheme))


def scale_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """The type that scales are rounded to and stored in: that of GPTQ and AWQ is float16, of native FP8 float32."""
    match recipe.format:
        case "compressed-tensors":
            return dtype
        case "fp8":
            return torch.float32
    return torch.float16


def quantization_config(recipe: Recipe, schemes: Mapping[str, QuantScheme], ignore: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`, of layers with these schemes and of names that stay as they are."""
    match recipe.format:
        case "compressed-tensors":
            return write_config(schemes, ignore, _observer(recipe), recipe.kv, _actorder(recipe))
        case "gptq" | "gptq_v2":
            return write_gptq_config(schemes, ignore, version=_version(recipe), desc_act=_desc_act(recipe))
        case "awq":
            return write_awq_config(schemes, ignore)
        case "fp8":
            return write_fp8_config(schemes, ignore)
        case "gguf":
            return {}


def _version(recipe: Recipe) -> Version:
    return 1 if recipe.format == "gptq" else 2


def _desc_act(recipe: Recipe) -> bool:
    return recipe.solver == "gptq" and recipe.act_order == "group"


def _actorder(recipe: Recipe) -> Any:
    return "static" if recipe.solver == "gptq" and recipe.act_order == "static" else None


def _observer(recipe: Recipe) -> str:
    return "mse" if recipe.search_of(recipe.default) == "mse" else "minmax"
