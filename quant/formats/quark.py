"""AMD Quark's FP8 and INT8 checkpoints, read.

Source: amd/Quark `torch/export/`, `torch/quantization/config/config.py`. A linear layer [N, K] has `weight` e4m3 or
int8 [N, K], `weight_scale` [] or [N], of integers `weight_zero_point` alike, and of static inputs `input_scale` []. The
config has `global_quant_config` for all layers but those that `exclude` names (globs): specs of weights and of inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat
from octavo.quant.formats.config_reading import check_types
from octavo.quant.formats.format import FormatError
from octavo.quant.scheme import CHANNEL, TENSOR, ActivationScheme, QuantScheme, SchemeError, WeightScheme

DTYPES = ("fp8_e4m3", "int8")


class _Spec(msgspec.Struct):
    """The keys of a tensor's spec that mean something; for checking only."""

    dtype: str
    qscheme: str | None = None
    ch_axis: int | None = None
    is_dynamic: bool | None = None
    symmetric: bool | None = None


class _Layer(msgspec.Struct):
    weight: _Spec | None = None
    input_tensors: _Spec | None = None
    output_tensors: _Spec | None = None


class _Config(msgspec.Struct):
    global_quant_config: _Layer
    exclude: list[str] | None = None
    layer_quant_config: dict[str, object] | None = None
    layer_type_quant_config: dict[str, object] | None = None
    kv_cache_quant_config: dict[str, object] | None = None
    algo_config: object = None


@dataclass(frozen=True)
class QuarkConfig:
    """One scheme for the quantized layers."""

    scheme: QuantScheme
    excluded: tuple[str, ...]
    name: str = "quark"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> CompressedTensorsFormat | None:
        """The format of a linear layer, given its full name; None if it is not quantized."""
        if any(fnmatchcase(module, pattern) for pattern in self.excluded):
            return None
        if suffixes is not None and "weight_scale" not in suffixes:
            return None
        return CompressedTensorsFormat(self.scheme)


def parse_quark(raw: Mapping[str, Any]) -> QuarkConfig:
    """A `quantization_config` with quant_method quark. Raises FormatError for what isn't supported."""
    config = check_types(raw, _Config)
    for key in ("layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config"):
        if getattr(config, key):
            raise FormatError(f"Quark's {key} is not supported: one scheme for all layers, and no KV cache's, is")
    layer = config.global_quant_config
    if layer.weight is None or layer.output_tensors is not None:
        raise FormatError("Quark's global_quant_config needs a weight, and outputs that aren't quantized")
    try:
        scheme = QuantScheme(
            _weight(layer.weight), None if layer.input_tensors is None else _input(layer.input_tensors)
        )
    except SchemeError as e:
        raise FormatError(str(e)) from e
    return QuarkConfig(scheme, tuple(config.exclude or ()))


def _weight(spec: _Spec) -> WeightScheme:
    granularity = {("per_tensor", None): TENSOR, ("per_channel", 0): CHANNEL}.get((spec.qscheme or "", spec.ch_axis))
    if spec.dtype not in DTYPES or granularity is None or spec.is_dynamic or spec.symmetric is False:
        raise SchemeError(
            f"Quark's {spec.dtype} weights, {spec.qscheme} along {spec.ch_axis}, symmetric {spec.symmetric}, are not "
            f"supported; {' and '.join(DTYPES)}, symmetric, per tensor or per channel along 0 are"
        )
    return WeightScheme("int8" if spec.dtype == "int8" else "fp8_e4m3", granularity)


def _input(spec: _Spec) -> ActivationScheme:
    is_static = (spec.qscheme, bool(spec.is_dynamic)) == ("per_tensor", False)
    is_per_token = (spec.qscheme, spec.ch_axis, bool(spec.is_dynamic)) == ("per_channel", 1, True)
    if spec.dtype not in DTYPES or not (is_static or is_per_token) or spec.symmetric is False:
        raise SchemeError(
            f"Quark's {spec.dtype} inputs, {spec.qscheme}, dynamic {spec.is_dynamic}, symmetric {spec.symmetric}, are "
            f"not supported; {' and '.join(DTYPES)}, symmetric, per tensor and static or per token and dynamic are"
        )
    dtype: Any = "int8" if spec.dtype == "int8" else "fp8_e4m3"
    return ActivationScheme(dtype, TENSOR, dynamic=False) if is_static else ActivationScheme(dtype, CHANNEL)
