"""A quantization scheme as a value: what the bits of a linear layer's weight, and of its input, mean.

Nothing here touches a tensor, and nothing guesses a scheme from a tensor's shape. A combination that no kernel or
format can mean can't be built: the constructors refuse it.

The preset names are compressed-tensors' own (`quantization/quant_scheme.py` there), so that a name typed here means
what it means to llm-compressor and vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightDtype = Literal["fp8_e4m3", "fp4_e2m1", "int8", "int6", "int5", "int4", "int3", "int2", "bf16"]
ActivationDtype = Literal["fp8_e4m3", "fp4_e2m1", "int8"]
Scales = Literal["float", "e4m3", "e8m0", "ue8m0", "super"]  # what a format has for scales; `WeightScheme` tells
Search = Literal["absmax", "mse"]  # how a scale is chosen: to cover every weight, or for the least squared error

BITS: dict[str, int] = {
    "fp8_e4m3": 8, "fp4_e2m1": 4, "int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2, "bf16": 16,
}  # fmt: skip
GROUP_SIZES = (32, 64, 128)
LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0}
"""The largest number that a code stands for where codes reach as far on both sides of zero."""
KV_SHORT_NAMES: dict[str, Literal["fp8_e4m3"]] = {"fp8": "fp8_e4m3"}
"""What users may call a KV cache's type, as vLLM has it."""


class SchemeError(ValueError):
    """A scheme, or a scheme on a layer of a certain shape, that can't be; the message says what would work."""


@dataclass(frozen=True)
class Granularity:
    """How many weights share a scale.

    tensor: one scale. channel: one per output row. group: one per `group_size` columns of a row.
    block: one per `block` = (rows, columns) tile; tiles at the edges may be short.
    """

    kind: Literal["tensor", "channel", "group", "block"]
    group_size: int | None = None
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.kind == "group") != (self.group_size is not None):
            raise SchemeError(f"granularity {self.kind!r}: group_size is for 'group', and 'group' needs one")
        if (self.kind == "block") != (self.block is not None):
            raise SchemeError(f"granularity {self.kind!r}: block is for 'block', and 'block' needs one")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group_size {self.group_size} must be positive; -1 is spelled 'channel'")
        if self.block is not None and min(self.block) < 1:
            raise SchemeError(f"block {self.block} must have positive sides")

    def tile(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Rows and columns that share a scale of a weight [out_features, in_features]."""
        match self.kind:
            case "tensor":
                return out_features, in_features
            case "channel":
                return 1, in_features
            case "group":
                assert self.group_size is not None
                return 1, self.group_size
            case "block":
                assert self.block is not None
                return self.block

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scale of a weight [out_features, in_features]; a short last group or edge block counts."""
        match self.kind:
            case "tensor":
                return (1, 1)
            case "channel":
                return (out_features, 1)
            case "group":
                assert self.group_size is not None
                return (out_features, -(-in_features // self.group_size))
            case "block":
                assert self.block is not None
                return (-(-out_features // self.block[0]), -(-in_features // self.block[1]))

    def __str__(self) -> str:
        match self.kind:
            case "group":
                return f"g{self.group_size}"
            case "block":
                assert self.block is not None
                return f"{self.block[0]}x{self.block[1]}"
        return self.kind


TENSOR = Granularity("tensor")
CHANNEL = Granularity("channel")


def group(size: int) -> Granularity:
    """Granularity of `size` columns; -1 means a whole row, as every quantizer spells it."""
    return CHANNEL if size == -1 else Granularity("group", group_size=size)


@dataclass(frozen=True)
class WeightScheme:
    """Integers: w = (q - zero_point) * scale, zero_point 0 when symmetric. Floats: w = q * scale.

    minima  integers from 0 up over a minimum, any number: w = q * scale - minimum (GGUF's Q4_K and its like)
    scales  float: any number. e8m0: a power of two (MXFP4, MXFP8). e4m3: an e4m3 number over one float32 for the whole
            weight (NVFP4). super: an integer times a float16 of 256 columns, as minima are (GGUF's K blocks)
    """

    dtype: WeightDtype
    granularity: Granularity
    symmetric: bool = True
    scales: Scales = "float"
    minima: bool = False

    def __post_init__(self) -> None:
        if self.is_float and not self.symmetric:
            raise SchemeError(f"{self.dtype} weights have no zero point: symmetric must be true")
        if self.minima and self.symmetric:
            raise SchemeError("weights over a minimum are not symmetric: symmetric must be false")
        if self.dtype == "bf16":
            raise SchemeError("an unquantized layer has no scheme: use None instead of a bf16 scheme")
        if self.scales == "ue8m0":
            raise SchemeError("ue8m0 scales are computed, of inputs; a weight's scales are powers of two as they are")
        _check_scales(self.dtype, self.granularity, self.scales)

    @property
    def bits(self) -> int:
        return BITS[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether codes are floating point, each a number of its own."""
        return self.dtype in ("fp8_e4m3", "fp4_e2m1")

    @property
    def int_range(self) -> tuple[int, int]:
        """Smallest and largest stored integer: (-8, 7) for int4, where zero points lie too; (0, 15) over minima."""
        if self.is_float:
            raise SchemeError(f"{self.dtype} is not an integer type")
        if self.minima:
            return 0, (1 << self.bits) - 1
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class ActivationScheme:
    """How a linear layer's input is rounded before the GEMM.

    granularity: 'tensor' with dynamic=False (a stored scale), or dynamic per token ('channel': one scale per row of
    the input) or per token and group of columns ('group').
    scales: as a weight's; of e4m3 ones each group's is computed, and what all are divided by is stored. ue8m0: of what
    float scales would be the next power of two (DeepSeek V3.1), where MX's e8m0 may be the one below.
    """

    dtype: ActivationDtype
    granularity: Granularity
    dynamic: bool = True
    scales: Scales = "float"

    def __post_init__(self) -> None:
        if self.granularity.kind == "block":
            raise SchemeError("activations have no block granularity; a token's groups are 'group'")
        if not self.dynamic and self.granularity.kind != "tensor":
            raise SchemeError(f"static activation scales are per tensor, not per {self.granularity}")
        if self.dtype == "fp4_e2m1" and self.scales == "float":
            raise SchemeError("fp4_e2m1 activations have e4m3 scales (NVFP4) or e8m0 scales (MXFP4)")
        _check_scales(self.dtype, self.granularity, self.scales)

    @property
    def has_stored_scale(self) -> bool:
        """Whether a checkpoint stores a number for the input, which calibration finds."""
        return not self.dynamic or self.scales == "e4m3"


def _check_scales(dtype: str, granularity: Granularity, scales: Scales) -> None:
    """Which numbers have scales of 8 bits: NVFP4's e4m3 for fp4_e2m1, MX's e8m0 for both floats, in groups."""
    of = {"e4m3": ("fp4_e2m1",), "e8m0": ("fp4_e2m1", "fp8_e4m3"), "ue8m0": ("fp8_e4m3",)}
    floats = of.get(scales)
    if scales == "super" and (not dtype.startswith("int") or granularity.kind != "group"):
        raise SchemeError(f"super-blocks are of integers in groups, not {dtype} per {granularity}")
    if floats is not None and (dtype not in floats or granularity.kind != "group"):
        raise SchemeError(f"{scales} scales are for {' and '.join(floats)} in groups, not {dtype} per {granularity}")


@dataclass(frozen=True)
class QuantScheme:
    """What a quantized linear layer is: its weight's scheme, and its input's when that is quantized too."""

    weight: WeightScheme
    activation: ActivationScheme | None = None

    def __post_init__(self) -> None:
        a = self.activation
        w = self.weight
        if a is not None and a.dtype == "int8" and w.is_float:
            raise SchemeError(f"int8 activations with {w.dtype} weights: no format and no kernel has that")
        if a is not None and w.granularity.kind == "block" and a.granularity.kind != "group":
            raise SchemeError("block-scaled weights go with activations in groups of the block's columns")
        if a is not None and a.dtype == "fp4_e2m1" and w.dtype != "fp4_e2m1":
            raise SchemeError(f"fp4_e2m1 activations with {w.dtype} weights: no format and no kernel has that")

    def __str__(self) -> str:
        over = "/min" if self.weight.minima else "" if self.weight.symmetric else "/asym"
        name = f"{self.weight.dtype}/{self.weight.granularity}{over}"
        name += "" if self.weight.scales == "float" else f"/{self.weight.scales}"
        if self.activation is not None:
            how = "token" if self.activation.granularity == CHANNEL else str(self.activation.granularity)
            how += "" if self.activation.scales == "float" else f"/{self.activation.scales}"
            name += f" x {self.activation.dtype}/{'' if self.activation.dynamic else 'static '}{how}"
        return name


@dataclass(frozen=True)
class KVScheme:
    """What a checkpoint's KV cache is to be stored as. Keys and values have static scales, symmetric.

    key, value  bf16: as computed, without a scale. Keys whose biases go beyond e4m3's range (Qwen2's) stay bf16.
    per_head    a scale for each KV head; else one for all
    """

    key: Literal["bf16", "fp8_e4m3", "int8"]
    value: Literal["bf16", "fp8_e4m3", "int8"]
    per_head: bool = False

    def __post_init__(self) -> None:
        kinds = {self.key, self.value} - {"bf16"}
        if len(kinds) != 1:
            raise SchemeError(f"KV cache of {self.key} keys and {self.value} values: one 8-bit type, or it and bf16")

    def __str__(self) -> str:
        name = self.key if self.key == self.value else f"k={self.key},v={self.value}"
        return f"{name}/{'head' if self.per_head else 'tensor'}"


_KV_NAMES: dict[str, Literal["bf16", "fp8_e4m3", "int8"]] = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp8_e4m3": "fp8_e4m3",
    "int8": "int8",
    **KV_SHORT_NAMES,
}


def parse_kv(spelled: str) -> KVScheme:
    """'fp8', 'int8', 'k=bf16,v=fp8', each with '/head' for a scale per KV head. Raises SchemeError."""
    types, slash, per = spelled.lower().partition("/")
    sides = dict.fromkeys("kv", types)
    if "=" in types:
        sides = dict(part.partition("=")[::2] for part in types.split(","))
    known = sides.keys() == {"k", "v"} and all(name in _KV_NAMES for name in sides.values())
    if not known or (slash and per not in ("head", "tensor")):
        raise SchemeError(f"KV cache {spelled!r} is unknown; such as fp8, int8, fp8/head or k=bf16,v=fp8 are known")
    return KVScheme(_KV_NAMES[sides["k"]], _KV_NAMES[sides["v"]], per_head=per == "head")


NVFP4 = WeightScheme("fp4_e2m1", group(16), scales="e4m3")
MXFP4 = WeightScheme("fp4_e2m1", group(32), scales="e8m0")
MXFP8 = WeightScheme("fp8_e4m3", group(32), scales="e8m0")
_W8A8 = QuantScheme(WeightScheme("int8", CHANNEL), ActivationScheme("int8", CHANNEL))

PRESETS: dict[str, QuantScheme] = {
    "W4A16": QuantScheme(WeightScheme("int4", group(128))),
    "W4A16_ASYM": QuantScheme(WeightScheme("int4", group(128), symmetric=False)),
    "W3A16": QuantScheme(WeightScheme("int3", group(128))),
    "W2A16": QuantScheme(WeightScheme("int2", group(128))),
    "W8A16": QuantScheme(WeightScheme("int8", group(128))),
    "W8A8": _W8A8,
    "INT8": _W8A8,
    "W4A8": QuantScheme(WeightScheme("int4", group(128)), ActivationScheme("int8", CHANNEL)),
    "W4AFP8": QuantScheme(WeightScheme("int4", group(128)), ActivationScheme("fp8_e4m3", CHANNEL)),
    "FP8": QuantScheme(WeightScheme("fp8_e4m3", TENSOR), ActivationScheme("fp8_e4m3", TENSOR, dynamic=False)),
    "FP8_DYNAMIC": QuantScheme(WeightScheme("fp8_e4m3", CHANNEL), ActivationScheme("fp8_e4m3", CHANNEL)),
    "FP8_BLOCK": QuantScheme(
        WeightScheme("fp8_e4m3", Granularity("block", block=(128, 128))), ActivationScheme("fp8_e4m3", group(128))
    ),
    "NVFP4": QuantScheme(NVFP4, ActivationScheme("fp4_e2m1", group(16), scales="e4m3")),
    "NVFP4A16": QuantScheme(NVFP4),
    "MXFP4": QuantScheme(MXFP4, ActivationScheme("fp4_e2m1", group(32), scales="e8m0")),
    "MXFP4A16": QuantScheme(MXFP4),
    "MXFP8": QuantScheme(MXFP8, ActivationScheme("fp8_e4m3", group(32), scales="e8m0")),
    "MXFP8A16": QuantScheme(MXFP8),
}

GGUF: dict[str, WeightScheme] = {
    "Q4_0": WeightScheme("int4", group(32)),
    "Q4_1": WeightScheme("int4", group(32), symmetric=False, minima=True),
    "Q5_0": WeightScheme("int5", group(32)),
    "Q5_1": WeightScheme("int5", group(32), symmetric=False, minima=True),
    "Q8_0": WeightScheme("int8", group(32)),
    "Q4_K": WeightScheme("int4", group(32), symmetric=False, scales="super", minima=True),
    "Q5_K": WeightScheme("int5", group(32), symmetric=False, scales="super", minima=True),
    "Q6_K": WeightScheme("int6", group(16), scales="super"),
}
"""Of the blocks that are written to GGUF files, by ggml's names."""
GGUF_MIXES = {"Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K"}
"""llama.cpp's mixes of blocks by layer: what most layers have."""
AT_LOAD = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "int4": "W4A16"}
"""The presets that the server applies to a dense checkpoint while it loads one with --dtype fp8, int8 or int4."""
HEAD_INT8 = QuantScheme(WeightScheme("int8", CHANNEL))
"""What --lm-head-dtype int8 makes of the output head."""


def scheme_at_load(dtype: str, in_features: int) -> QuantScheme:
    """AT_LOAD's scheme for a layer, of integers in the largest groups that fit. Raises SchemeError where none do."""
    preset = PRESETS[AT_LOAD[dtype]]
    weight = preset.weight
    if weight.granularity.kind != "group":
        return preset
    sizes = sorted(GROUP_SIZES, reverse=True)
    fitting = [size for size in sizes if in_features % size == 0]
    if not fitting:
        raise SchemeError(
            f"in_features {in_features} is a multiple of no group size ({', '.join(map(str, sizes))}), "
            f"so --dtype {dtype} can't be had; int8 can"
        )
    return QuantScheme(WeightScheme(weight.dtype, group(fitting[0]), weight.symmetric), preset.activation)
