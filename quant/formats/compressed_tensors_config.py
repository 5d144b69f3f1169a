"""Parses the `quantization_config` of a compressed-tensors checkpoint into a scheme for each linear layer.

Source: vllm-project/compressed-tensors, `quantization/quant_config.py`, `quantization/quant_args.py`, `utils/match.py`.
A scheme that octavo doesn't support is refused once a layer has it, with the group's name and the reason, so that a
group that no layer uses does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import torch

from octavo.quant.formats.compressed_tensors import SCALE_DTYPES, CompressedTensorsFormat, format_for
from octavo.quant.formats.config_reading import check_types
from octavo.quant.formats.format import FormatError, QuantFormat
from octavo.quant.formats.microscaling import NAMES, WEIGHTS, Kind, MicroscalingFormat
from octavo.quant.formats.targets import Targets
from octavo.quant.formats.transforms import NO_TRANSFORMS, Transforms, parse_transforms
from octavo.quant.printable import some
from octavo.quant.scheme import (
    CHANNEL,
    PRESETS,
    TENSOR,
    ActivationScheme,
    Granularity,
    QuantScheme,
    Scales,
    SchemeError,
    WeightDtype,
    WeightScheme,
    group,
)


class _Args(msgspec.Struct):
    """The types of compressed-tensors' QuantizationArgs; this and the next two are for checking only."""

    num_bits: int | None = None
    type: str | None = None
    symmetric: bool | None = None
    strategy: str | None = None
    group_size: int | None = None
    block_structure: str | list[int] | None = None
    dynamic: bool | str | None = None
    actorder: bool | str | None = None
    scale_dtype: str | None = None


class _Group(msgspec.Struct):
    targets: list[str] | None = None
    weights: _Args | None = None
    input_activations: _Args | None = None
    output_activations: _Args | None = None
    format: str | None = None


class _Config(msgspec.Struct):
    config_groups: dict[str, _Group | list[str]] | None = None
    ignore: list[str] | None = None
    format: str | None = None
    quantization_status: str | None = None
    kv_cache_scheme: _Args | None = None
    sparsity_config: dict[str, object] | None = None
    transform_config: dict[str, object] | None = None


INT_DTYPES: dict[int, WeightDtype] = {8: "int8", 6: "int6", 5: "int5", 4: "int4", 3: "int3", 2: "int2"}
MICROSCALING: dict[str, Kind] = {name: kind for kind, name in NAMES.items()}
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")


@dataclass(frozen=True)
class ConfigGroup:
    """One entry of config_groups: its layers, and their format or the reason why there is none."""

    name: str
    targets: Targets
    format: QuantFormat | None
    problem: str = ""


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """A scheme for each layer. kv_cache: its type, 'fp8_e4m3' or 'int8', if the checkpoint has scales for it.

    transforms: what is done while serving beside products
    """

    groups: tuple[ConfigGroup, ...]
    ignore: Targets
    kv_cache: str | None = None
    transforms: Transforms = NO_TRANSFORMS
    name: str = "compressed-tensors"

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> QuantFormat | None:  # noqa: ARG002
        """The format of a linear layer, given its full name; None if it is not quantized.

        Raises FormatError if octavo doesn't support its scheme.
        """
        group_ = None if self.ignore.match(module) else self._group_of(module)
        if group_ is None:
            return None
        if group_.format is None:
            targets = some(group_.targets.patterns)
            raise FormatError(f"{module}: config group {group_.name!r} (targets {targets}): {group_.problem}")
        return group_.format

    def _group_of(self, module: str) -> ConfigGroup | None:
        """Names before regexes before the class: compressed-tensors' own order (`match_targets`)."""
        by_name = (group_ for group_ in self.groups if module in group_.targets.names)
        by_regex = (group_ for group_ in self.groups if group_.targets.regexes.match(module))
        by_class = (group_ for group_ in self.groups if group_.targets.has_class_of(module))
        return next(chain(by_name, by_regex, by_class), None)


def matches(module: str, pattern: str) -> bool:
    """Whether a target means this linear layer, where the user wrote it: 'Linear', its full name, or a regex."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern in ("Linear", module)


def parse_config(raw: Mapping[str, Any]) -> CompressedTensorsConfig:
    """A config.json's `quantization_config` with quant_method compressed-tensors. Raises FormatError."""
    check_types(raw, _Config)
    stored = raw.get("format") or "dense"
    if (raw.get("quantization_status") or "compressed") not in ("compressed", "frozen"):
        raise FormatError(f"quantization_status {raw['quantization_status']!r}: only finished checkpoints can be read")
    if (sparsity := raw.get("sparsity_config")) and sparsity.get("format", "") != "dense":
        raise FormatError(f"sparsity_config {sparsity!r}: sparse weights are not supported")
    groups = []
    for name, entry in (raw.get("config_groups") or {}).items():
        if isinstance(entry, list):
            groups.append(_preset_group(name, entry))
        else:
            groups.append(_parse_group(name, entry, entry.get("format") or stored))
    ignore = Targets(raw.get("ignore") or (), "ignore")
    kv_cache = _parse_kv_cache(raw.get("kv_cache_scheme"))
    transforms = parse_transforms(raw.get("transform_config"), has_kv_scales=kv_cache is not None)
    return CompressedTensorsConfig(tuple(groups), ignore, kv_cache, transforms)


def _preset_group(name: str, targets: list[str]) -> ConfigGroup:
    scheme = PRESETS.get(name.upper())
    problem = "" if scheme else f"preset {name!r} is unknown here; known are {', '.join(PRESETS)}"
    format_ = format_for(scheme, torch.bfloat16) if scheme else None
    return ConfigGroup(name, Targets(targets, f"config_groups.{name}"), format_, problem)


def _parse_group(name: str, entry: Mapping[str, Any], stored: str) -> ConfigGroup:
    targets = Targets(entry.get("targets") or (), f"config_groups.{name}.targets")
    try:
        if entry.get("output_activations"):
            raise SchemeError("output_activations: quantized outputs are not supported")
        if not (weights := entry.get("weights")):
            raise SchemeError("it has no weights entry: quantized activations alone are not supported")
        activation = parse_activations(entry.get("input_activations"))
        if stored in MICROSCALING or _is_microscaled(weights):
            return ConfigGroup(name, targets, _microscaling(weights, activation, stored))
        if stored not in FORMATS:
            raise SchemeError(f"format {stored!r} is not supported")
        scheme = QuantScheme(parse_weights(weights), activation)
        act_order = weights.get("actorder") in ("group", "dynamic", True)
    except SchemeError as e:
        return ConfigGroup(name, targets, None, str(e))
    return ConfigGroup(name, targets, CompressedTensorsFormat(scheme, act_order=act_order))


def _is_microscaled(args: Mapping[str, Any]) -> bool:
    """Whether a weight's numbers are floats of 4 bits, or of 8 with scales that are powers of two."""
    if args.get("type") != "float":
        return False
    return args.get("num_bits") == 4 or (args.get("num_bits") == 8 and args.get("scale_dtype") == SCALE_DTYPES["e8m0"])


def _microscaling(weights: Mapping[str, Any], activation: ActivationScheme | None, stored: str) -> MicroscalingFormat:
    """NVFP4, MXFP4 or MXFP8. Raises SchemeError with the reason."""
    bits, kind, size = (weights.get(key) for key in ("num_bits", "type", "group_size"))
    strategy = weights.get("strategy")
    known: dict[tuple[Any, ...], Kind] = {
        (4, "float", "tensor_group", 16): "nvfp4",
        (4, "float", "group", 32): "mxfp4",
        (8, "float", "group", 32): "mxfp8",
    }
    found = known.get((bits, kind, strategy, size))
    if found is None or MICROSCALING.get(stored, found) != found or stored not in (*MICROSCALING, "mixed-precision"):
        raise SchemeError(
            f"format {stored!r} with {bits}-bit {kind} weights, strategy {strategy}, group_size {size} is not "
            "supported; NVFP4 (tensor_group of 16), MXFP4 and MXFP8 (group of 32) are"
        )
    if activation is not None and not activation.dynamic:
        raise SchemeError(f"{found} weights with a static scale for inputs are not supported")
    return MicroscalingFormat(QuantScheme(WEIGHTS[found], activation))


def parse_weights(args: Mapping[str, Any]) -> WeightScheme:
    """compressed-tensors' QuantizationArgs of a weight. Raises SchemeError with the reason."""
    bits = args.get("num_bits", 8)
    kind = args.get("type", "int")
    symmetric = args.get("symmetric", True)
    if args.get("dynamic"):
        raise SchemeError("dynamic weight scales mean nothing")
    if kind == "float":
        if bits != 8:
            raise SchemeError(f"{bits}-bit float weights (strategy {args.get('strategy')}) are not supported")
        return WeightScheme("fp8_e4m3", _weight_granularity(args), symmetric)
    if kind != "int" or bits not in INT_DTYPES:
        raise SchemeError(f"{bits}-bit {kind} weights are not supported; integers of {sorted(INT_DTYPES)} bits are")
    return WeightScheme(INT_DTYPES[bits], _weight_granularity(args), symmetric)


def _weight_granularity(args: Mapping[str, Any]) -> Granularity:
    size = args.get("group_size")
    block = args.get("block_structure")
    strategy = args.get("strategy")
    if strategy is None:  # compressed-tensors infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    match strategy:
        case "tensor":
            return TENSOR
        case "channel":
            return CHANNEL
        case "group" if size is not None:
            return group(size)
        case "block" if block is not None:
            try:
                rows, columns = (int(side) for side in (block.split("x") if isinstance(block, str) else block))
            except ValueError:
                raise SchemeError(f"block_structure {block!r} is not two numbers") from None
            return Granularity("block", block=(rows, columns))
    raise SchemeError(f"weight strategy {strategy!r} with group_size {size}, block_structure {block} is not supported")


def parse_activations(args: Mapping[str, Any] | None) -> ActivationScheme | None:
    """compressed-tensors' QuantizationArgs of a layer's input. Raises SchemeError with the reason."""
    if not args:
        return None
    bits = args.get("num_bits", 8)
    kind = args.get("type", "int")
    strategy = args.get("strategy")
    dynamic = args.get("dynamic", False)
    if not args.get("symmetric", True):
        raise SchemeError("asymmetric activations are not supported")
    if (bits, kind) == (4, "float"):
        return _fp4_activations(args)
    if bits != 8:
        raise SchemeError(f"{bits}-bit {kind} activations are not supported; 8 bits, and floats of 4 bits, are")
    dtype: Any = "fp8_e4m3" if kind == "float" else "int8"
    match strategy, dynamic:
        case "token", True:
            return ActivationScheme(dtype, CHANNEL)
        case "group", True if args.get("group_size"):
            scales: Scales = "e8m0" if kind == "float" and args.get("scale_dtype") == SCALE_DTYPES["e8m0"] else "float"
            return ActivationScheme(dtype, group(args["group_size"]), scales=scales)
        case (("tensor" | None), False):
            return ActivationScheme(dtype, TENSOR, dynamic=False)
        case (("tensor" | None), True):
            raise SchemeError("dynamic activation scales per tensor would make an answer depend on its batch")
    raise SchemeError(f"activation strategy {strategy!r} with dynamic {dynamic!r} is not supported")


def _fp4_activations(args: Mapping[str, Any]) -> ActivationScheme:
    """NVFP4's inputs or MXFP4's. Raises SchemeError for others."""
    found = tuple(args.get(key) for key in ("strategy", "dynamic", "group_size"))
    if found == ("tensor_group", "local", 16):
        return ActivationScheme("fp4_e2m1", group(16), scales="e4m3")
    if found == ("group", True, 32):
        return ActivationScheme("fp4_e2m1", group(32), scales="e8m0")
    raise SchemeError(
        f"4-bit float activations with strategy {found[0]!r}, dynamic {found[1]!r}, group_size {found[2]} are not "
        "supported; NVFP4's (tensor_group of 16, local) and MXFP4's (group of 32, dynamic) are"
    )


def _parse_kv_cache(args: Mapping[str, Any] | None) -> str | None:
    if not args:
        return None
    bits = args.get("num_bits")
    kind = args.get("type")
    strategy = args.get("strategy")
    dynamic = args.get("dynamic", False)
    symmetric = args.get("symmetric", True)
    if bits != 8 or kind not in ("float", "int") or strategy not in ("tensor", "attn_head") or dynamic or not symmetric:
        raise FormatError(
            f"kv_cache_scheme with {bits}-bit {kind}, strategy {strategy}, dynamic {dynamic}, symmetric {symmetric}: "
            "supported are 8-bit float or int, symmetric, static, per tensor or attn_head"
        )
    return "fp8_e4m3" if kind == "float" else "int8"
