"""AMD Quark's FP8, INT8, MXFP4, MXFP6 and integers of 4 bits, read.

Source: amd/Quark `torch/export/`, `torch/quantization/config/config.py`, `torch/utils/pack.py`. A linear layer [N, K]:

fp8, int8     weight e4m3 or int8 [N, K]; weight_scale [] or [N], of integers weight_zero_point alike; of static inputs
              input_scale []
fp4           MXFP4, as `microscaling` has it: weight [N, K / 2] uint8, weight_scale [N, K / 32] e8m0
fp6           MXFP6, e2m3 or e3m2: see `mxfp6`
int4, uint4   in G groups as AWQ: weight [K, N / 8] int32, weight_zero_point [G, N / 8] alike, weight_scale [G, N]. With
              pack_method reorder fields are in AWQ's order, else one after the other; int4's are two's complement

The config has specs of weights and of inputs: in `layer_quant_config` for the layers of a name or a glob, whose order a
sorted file doesn't keep; in `layer_type_quant_config` for linear layers; in `global_quant_config` for all others. Those
that `exclude` names (globs) have none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import torch
from torch import Tensor

from octavo.quant.formats.awq import unpack_fields
from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat
from octavo.quant.formats.config_reading import check_types
from octavo.quant.formats.format import FormatError, QuantFormat
from octavo.quant.formats.microscaling import MicroscalingFormat
from octavo.quant.formats.mxfp6 import Mxfp6Format
from octavo.quant.formats.reading import check_nothing_left, check_shape, sides, take_scales, take_words
from octavo.quant.packing import unpack
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import (
    CHANNEL,
    MXFP4,
    PRESETS,
    TENSOR,
    ActivationScheme,
    QuantScheme,
    SchemeError,
    WeightScheme,
    group,
)

DTYPES = ("fp8_e4m3", "int8")
FOUR_BITS = {"int4": True, "uint4": False}  # whether they are symmetric
SIX_BITS = {"fp6_e2m3": 2, "fp6_e3m2": 3}  # bits of their exponents
ALONG_COLUMNS = (-1, 1)
LINEAR = "Linear"
SIGNS = -0x77777778  # the highest bit of each field of a word


class _Spec(msgspec.Struct):
    """The keys of a tensor's spec that mean something; for checking only."""

    dtype: str
    qscheme: str | None = None
    ch_axis: int | None = None
    is_dynamic: bool | None = None
    symmetric: bool | None = None
    group_size: int | None = None
    scale_format: str | None = None
    scale_calculation_mode: str | None = None
    zero_point_type: str | None = None


class _Export(msgspec.Struct):
    pack_method: str = "reorder"


class _Layer(msgspec.Struct):
    weight: _Spec | None = None
    input_tensors: _Spec | None = None
    output_tensors: _Spec | None = None


class _Config(msgspec.Struct):
    global_quant_config: _Layer
    exclude: list[str] | None = None
    layer_quant_config: dict[str, _Layer] | None = None
    layer_type_quant_config: dict[str, _Layer] | None = None
    kv_cache_quant_config: dict[str, object] | None = None
    softmax_quant_spec: dict[str, object] | None = None
    algo_config: list[dict[str, object]] | dict[str, object] | None = None
    export: _Export | None = None


@dataclass(frozen=True)
class QuarkInt4Format:
    """Reads a layer of integers of 4 bits. is_reordered: by pack_method."""

    scheme: QuantScheme
    is_reordered: bool

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors, as Quark writes them for scales of bfloat16."""
        groups = self.scheme.weight.granularity.scale_shape(out_features, in_features)[1]
        words = -(-out_features // 8)
        return {
            "weight": TensorSpec(torch.int32, (in_features, words)),
            "weight_zero_point": TensorSpec(torch.int32, (groups, words)),
            "weight_scale": TensorSpec(torch.bfloat16, (groups, out_features)),
        }

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        rows, words = sides(tensors, "weight")
        return 8 * words, rows

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:  # noqa: ARG002
        raise FormatError("Quark's layout is read, not written; compressed-tensors and awq hold the same integers")

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight. Raises FormatError if a tensor is missing, unexpected, or not as the scheme says."""
        left = dict(tensors)
        words = take_words(left, "weight")
        zero_words = take_words(left, "weight_zero_point")
        scale = take_scales(left, "weight_scale")
        check_nothing_left(left, "beside Quark's integers of 4 bits")
        k = words.shape[0]
        n = 8 * words.shape[1]
        groups = self.scheme.weight.granularity.scale_shape(n, k)[1]
        why = f"of weight {list(words.shape)} and {self.scheme}"
        check_shape("weight_scale", scale, (groups, n), why)
        check_shape("weight_zero_point", zero_words, (groups, n // 8), why)
        codes = self._fields(words)
        zeros = self._fields(zero_words)
        if not self.scheme.weight.symmetric:
            return QuantizedWeight(self.scheme, codes, scale.t().contiguous(), zeros)
        if bool(zeros.any()):
            raise FormatError("weight_zero_point is not 0 although the scheme is symmetric")
        return QuantizedWeight(self.scheme, codes, scale.t().contiguous())

    def _fields(self, words: Tensor) -> Tensor:
        """[rows, words] int32 to [8 words, rows] int8, signed."""
        if self.scheme.weight.symmetric:
            words = words ^ SIGNS
        fields = unpack_fields(words) if self.is_reordered else unpack(words, 4, 8 * words.shape[1])
        return fields.t().contiguous()


@dataclass(frozen=True)
class QuarkConfig:
    """The quantized layers' formats; None: not quantized.

    format    of layers that are not among the others
    named     of single ones, by their full names
    patterns  of those that a glob matches
    """

    format: QuantFormat | None
    excluded: tuple[str, ...]
    named: Mapping[str, QuantFormat | None]
    patterns: Mapping[str, QuantFormat | None]
    name: str = "quark"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> QuantFormat | None:
        """The format of a linear layer, given its full name; None if it is not quantized.

        Raises FormatError for a layer that globs of different formats match.
        """
        if any(fnmatchcase(module, pattern) for pattern in self.excluded):
            return None
        if suffixes is not None and "weight_scale" not in suffixes:
            return None
        if module in self.named:
            return self.named[module]
        matching = {pattern: found for pattern, found in self.patterns.items() if fnmatchcase(module, pattern)}
        if len(formats := set(matching.values())) > 1:
            raise FormatError(
                f"{module}: {' and '.join(matching)} of Quark's layer_quant_config match it with different schemes, "
                "and their order isn't known; one that matches, or the layer's own name, works"
            )
        return formats.pop() if formats else self.format


def parse_quark(raw: Mapping[str, Any]) -> QuarkConfig:
    """A `quantization_config` with quant_method quark. Raises FormatError for what isn't supported."""
    config = check_types(raw, _Config)
    for key in ("kv_cache_quant_config", "softmax_quant_spec"):
        if getattr(config, key):
            raise FormatError(f"Quark's {key} is not supported: attention and its cache as they are, are")
    _check_algorithms([config.algo_config] if isinstance(config.algo_config, dict) else config.algo_config or [])
    types = config.layer_type_quant_config or {}
    if others := sorted(types.keys() - {LINEAR}):
        raise FormatError(f"Quark's layer_type_quant_config has {', '.join(others)}; {LINEAR} alone is supported")
    layers = config.layer_quant_config or {}
    pack_method = "reorder" if config.export is None else config.export.pack_method
    key, layer = (
        ("layer_type_quant_config", types[LINEAR]) if types else ("global_quant_config", config.global_quant_config)
    )
    if layer.weight is None and not layers:
        raise FormatError(f"Quark's {key} needs a weight where no layer_quant_config has one")
    formats = {name: _layer_format(f"layer_quant_config {name!r}", one, pack_method) for name, one in layers.items()}
    globs = {name for name in formats if set("*?[") & set(name)}
    return QuarkConfig(
        _layer_format(key, layer, pack_method),
        tuple(config.exclude or ()),
        {name: one for name, one in formats.items() if name not in globs},
        {name: one for name, one in formats.items() if name in globs},
    )


def _layer_format(key: str, layer: _Layer, pack_method: str) -> QuantFormat | None:
    """The format that a layer's specs say; None: its weight isn't quantized."""
    if layer.output_tensors is not None or (layer.weight is None and layer.input_tensors is not None):
        what = "outputs" if layer.output_tensors is not None else "inputs of weights that aren't"
        raise FormatError(f"Quark's {key} quantizes {what}, which is not supported; weights, and inputs with them, are")
    if layer.weight is None:
        return None
    try:
        return _format(layer.weight, layer.input_tensors, pack_method)
    except SchemeError as e:
        raise FormatError(f"{key}: {e}") from e


def _check_algorithms(algorithms: list[dict[str, object]]) -> None:
    """Refuse rotations of inputs; those that are folded into weights, and other algorithms, change stored numbers.

    r3 rotates queries and keys alike, which changes nothing. quarot is an older name of rotations that are all on.
    """
    for algorithm in algorithms:
        is_older = algorithm.get("name") == "quarot"
        if not is_older and algorithm.get("name") != "rotation":
            continue
        for key, usual in (("online_r1_rotation", False), ("r4", is_older)):
            if algorithm.get(key, usual):
                raise FormatError(
                    f"Quark's algo_config has {algorithm['name']} with {key}, which rotates inputs while the model "
                    "runs: that is not supported; r1 and r2, folded into weights, are"
                )


def _format(weight: _Spec, inputs: _Spec | None, pack_method: str) -> QuantFormat:
    if weight.dtype in SIX_BITS and _is_mx(weight, weight.dtype) and not weight.is_dynamic:
        if inputs is not None:
            raise SchemeError(
                f"Quark's {inputs.dtype} inputs are not supported with MXFP6 weights; inputs as they are "
                "(input_tensors null) are"
            )
        return Mxfp6Format(SIX_BITS[weight.dtype])
    if _is_mx(weight, "fp4") and not weight.is_dynamic:
        if inputs is None:
            return MicroscalingFormat(QuantScheme(MXFP4), modelopt=True)
        if not (_is_mx(inputs, "fp4") and inputs.is_dynamic) or inputs.scale_calculation_mode not in (None, "even"):
            raise SchemeError(
                f"Quark's {inputs.dtype} inputs, {inputs.qscheme}, dynamic {inputs.is_dynamic}, scales by "
                f"{inputs.scale_calculation_mode}, are not supported with MXFP4 weights; dynamic MXFP4 by even is"
            )
        return MicroscalingFormat(PRESETS["MXFP4"], modelopt=True)
    if weight.dtype in FOUR_BITS and _is_plain_int4(weight) and inputs is None and pack_method in ("reorder", "order"):
        assert weight.group_size is not None
        scheme = WeightScheme("int4", group(weight.group_size), symmetric=FOUR_BITS[weight.dtype])
        return QuarkInt4Format(QuantScheme(scheme), is_reordered=pack_method == "reorder")
    return CompressedTensorsFormat(QuantScheme(_weight(weight), None if inputs is None else _input(inputs)))


def _is_mx(spec: _Spec, dtype: str) -> bool:
    kind = (spec.dtype, spec.qscheme, spec.group_size, spec.scale_format)
    return kind == (dtype, "per_group", 32, "e8m0") and spec.ch_axis in ALONG_COLUMNS


def _is_plain_int4(spec: _Spec) -> bool:
    """int4 symmetric and uint4 over zero points, in groups of columns."""
    is_grouped = spec.qscheme == "per_group" and spec.ch_axis in ALONG_COLUMNS and (spec.group_size or 0) > 0
    is_static = not spec.is_dynamic and spec.zero_point_type in (None, "int32")
    return is_grouped and is_static and spec.symmetric is FOUR_BITS[spec.dtype]


def _weight(spec: _Spec) -> WeightScheme:
    granularity = {("per_tensor", None): TENSOR, ("per_channel", 0): CHANNEL}.get((spec.qscheme or "", spec.ch_axis))
    if spec.dtype not in DTYPES or granularity is None or spec.is_dynamic or spec.symmetric is False:
        raise SchemeError(
            f"Quark's {spec.dtype} weights, {spec.qscheme} along {spec.ch_axis}, symmetric {spec.symmetric}, are not "
            f"supported; {' and '.join(DTYPES)}, symmetric, per tensor or per channel along 0 are, and in groups along "
            "-1 MXFP4, MXFP6, int4 that is symmetric and uint4 that isn't, inputs as they are"
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
