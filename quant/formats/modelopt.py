"""NVIDIA ModelOpt's FP8, NVFP4 and MXFP8 checkpoints, read: `hf_quant_config.json`, or the same in config.json.

Source: NVIDIA/TensorRT-Model-Optimizer `modelopt/torch/export/`. A linear layer [N, K] has `weight` e4m3 [N, K] and

FP8                        weight_scale [] float32, input_scale [] float32, static
FP8_PER_CHANNEL_PER_TOKEN  weight_scale [N] float32; input rounded per token
NVFP4, W4A16_NVFP4         see microscaling.py; inputs stay as they are in the second, and where no config group rounds
                           them
MXFP8                      see microscaling.py; input rounded alike

KV scales stand at k_proj.k_scale and v_proj.v_scale. Layers left out are globs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from octavo.quant.formats.config_reading import check_types
from octavo.quant.formats.format import FormatError, QuantFormat
from octavo.quant.formats.fp8 import WEIGHT_SCALES, Fp8Format
from octavo.quant.formats.microscaling import MicroscalingFormat, kind_of
from octavo.quant.scheme import PRESETS, QuantScheme

SCHEMES: dict[str, QuantScheme] = {
    "FP8": PRESETS["FP8"],
    "FP8_PER_CHANNEL_PER_TOKEN": PRESETS["FP8_DYNAMIC"],
    "NVFP4": PRESETS["NVFP4"],
    "W4A16_NVFP4": PRESETS["NVFP4A16"],
    "MXFP8": PRESETS["MXFP8"],
}
KV_CACHES = {"FP8": "fp8_e4m3", "INT8": "int8"}


class _Config(msgspec.Struct):
    """The types of either file's keys; for checking only."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int | None = None
    exclude_modules: list[str] | None = None
    ignore: list[str] | None = None
    kv_cache_scheme: dict[str, object] | None = None
    config_groups: dict[str, dict[str, object]] | None = None


@dataclass(frozen=True)
class ModelOptConfig:
    """One scheme for the quantized layers. scheme None: only the KV cache is quantized."""

    scheme: QuantScheme | None
    excluded: tuple[str, ...]
    kv_cache: str | None = None
    name: str = "modelopt"

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> QuantFormat | None:
        """The format of a linear layer, given its full name; None if it is not quantized."""
        if self.scheme is None or any(_excludes(pattern, module) for pattern in self.excluded):
            return None
        if suffixes is not None and not any(name in suffixes for name in WEIGHT_SCALES):
            return None  # not every version lists lm_head and routers
        if kind_of(self.scheme.weight) is not None:
            return MicroscalingFormat(self.scheme, modelopt=True)
        return Fp8Format(self.scheme)


def _excludes(pattern: str, module: str) -> bool:
    """Whether a glob matches the module's name or that of a module that contains it."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")


def parse_modelopt(raw: Mapping[str, Any]) -> ModelOptConfig:
    """`hf_quant_config.json`, or a `quantization_config` with quant_method modelopt. Raises FormatError."""
    config = check_types(raw.get("quantization", raw), _Config, "quantization")
    algorithm = (config.quant_algo or "").upper()
    if algorithm not in ("", *SCHEMES):
        raise FormatError(f"ModelOpt's quant_algo {config.quant_algo!r} is not supported; {', '.join(SCHEMES)} are")
    if algorithm == "NVFP4" and config.config_groups:
        rounded = any(group.get("input_activations") for group in config.config_groups.values())
        algorithm = algorithm if rounded else "W4A16_NVFP4"
    scheme = SCHEMES.get(algorithm)
    size = None if scheme is None else scheme.weight.granularity.group_size
    if size is not None and config.group_size not in (None, size):
        raise FormatError(f"ModelOpt's {algorithm} with group_size {config.group_size} is not supported; {size} is")
    excluded = (*(config.exclude_modules or ()), *(config.ignore or ()))
    return ModelOptConfig(scheme, excluded, _kv_cache(config))


def _kv_cache(config: _Config) -> str | None:
    algorithm = config.kv_cache_quant_algo
    if algorithm is not None:
        if algorithm.upper() not in KV_CACHES:
            raise FormatError(f"kv_cache_quant_algo {algorithm!r} is not supported; {', '.join(KV_CACHES)} are")
        return KV_CACHES[algorithm.upper()]
    if not config.kv_cache_scheme:
        return None
    found = {key: config.kv_cache_scheme.get(key) for key in ("num_bits", "type", "dynamic")}
    if found["num_bits"] != 8 or found["type"] not in ("float", "int") or found["dynamic"]:
        raise FormatError(f"kv_cache_scheme {found} is not supported; static 8-bit float or int is")
    return "fp8_e4m3" if found["type"] == "float" else "int8"
