"""Native FP8, `quant_method: fp8`: DeepSeek's and Qwen's blocks, and one scale a tensor (AutoFP8, Mistral's).

Source: vLLM `model_executor/layers/quantization/fp8.py`; transformers `integrations/finegrained_fp8.py`. A linear layer
[N, K] has `weight` e4m3 [N, K] and

blocks  weight_scale_inv [ceil(N / 128), ceil(K / 128)], which multiplies despite its name; input rounded per token and
        group of 128 columns. With scale_fmt ue8m0 (DeepSeek V3.1) scales are powers of two, the weight's in float32,
        e8m0 or e8m0's bytes
tensor  weight_scale [] or [1]; input_scale the same where activation_scheme is static, else input rounded per token.
        transformers names them weight_scale_inv and activation_scale

The config's list of ignored layers is often incomplete (lm_head, routers): a layer without a scale is not quantized.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from octavo.kernels.fp4.reference import e8m0_to_float
from octavo.quant.formats.config_reading import check_types
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.reading import check_input_scale, check_nothing_left, reshape, sides, take
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import (
    CHANNEL,
    TENSOR,
    ActivationScheme,
    Granularity,
    QuantScheme,
    Scales,
    WeightScheme,
    group,
)

WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
INPUT_SCALES = ("input_scale", "activation_scale")
UE8M0 = "ue8m0"
E8M0_NAN = 255
SUFFIXES = ("weight", *WEIGHT_SCALES, *INPUT_SCALES)
NEVER_QUANTIZED = re.compile(r"(^|\.)(lm_head|gate|router)$")  # used if there is no file to ask


@dataclass(frozen=True)
class Fp8Format:
    """Converts one layer's tensors, keyed by suffix, to and from the canonical weight."""

    scheme: QuantScheme

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, types and shapes of the tensors that `write` returns for a weight of this shape."""
        granularity = self.scheme.weight.granularity
        shape = granularity.scale_shape(out_features, in_features)
        specs = {"weight": TensorSpec(torch.float8_e4m3fn, (out_features, in_features))}
        if granularity.kind == "block":
            specs["weight_scale_inv"] = TensorSpec(torch.float32, shape)
        else:
            specs["weight_scale"] = TensorSpec(torch.float32, () if granularity == TENSOR else (out_features,))
        if self._is_static:
            specs["input_scale"] = TensorSpec(torch.float32, ())
        return specs

    @property
    def _is_static(self) -> bool:
        return self.scheme.activation is not None and self.scheme.activation.has_stored_scale

    @property
    def _has_powers(self) -> bool:
        return self.scheme.activation is not None and self.scheme.activation.scales == "ue8m0"

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        return sides(tensors, "weight")

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `tensors` announces. Raises FormatError for a weight that the format can't hold."""
        check_writable(self.scheme)
        specs = self.tensors(*weight.shape)
        name = "weight_scale_inv" if "weight_scale_inv" in specs else "weight_scale"
        out = {"weight": weight.codes, name: weight.scale.float().reshape(specs[name].shape)}
        if self._is_static:
            if weight.input_scale is None:
                raise FormatError(f"{self.scheme} needs an input_scale, which only calibration gives")
            out["input_scale"] = weight.input_scale.float().reshape(())
        return out

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight. Raises FormatError if a tensor is missing, unexpected, or of a wrong shape or type."""
        left = dict(tensors)
        codes = left.pop("weight", None)
        if codes is None or codes.dtype != torch.float8_e4m3fn or codes.ndim != 2:
            found = "missing" if codes is None else f"{codes.dtype} {list(codes.shape)}"
            raise FormatError(f"weight is {found}; float8_e4m3fn [N, K] is expected")
        n, k = codes.shape
        if self._has_powers:
            _decode_powers(left)
        scale = _take_scale(left, WEIGHT_SCALES, self.scheme.weight.granularity.scale_shape(n, k))
        static = None
        if self._is_static:
            static = check_input_scale(_take_scale(left, INPUT_SCALES, (1, 1)).float().reshape(()))
        check_nothing_left(left, f"with scheme {self.scheme}")
        return QuantizedWeight(self.scheme, codes, scale, input_scale=static)


def _decode_powers(left: dict[str, Tensor]) -> None:
    """Exponents among a weight's scales to float32."""
    for name in WEIGHT_SCALES:
        stored = left.get(name)
        if stored is not None and stored.dtype in (torch.float8_e8m0fnu, torch.uint8):
            exponents = stored.view(torch.uint8)
            if bool((exponents == E8M0_NAN).any()):
                raise FormatError(f"{name} holds NaN")
            left[name] = e8m0_to_float(exponents)


def _take_scale(left: dict[str, Tensor], names: tuple[str, ...], shape: tuple[int, int]) -> Tensor:
    """Take the scale by whichever of its names is there, in `shape`; sides of 1 may come and go."""
    missing = names[-1] if shape == (1, 1) else names[0]
    name = next((name for name in names if name in left), missing)
    scale = take(left, name)
    if not scale.is_floating_point() or scale.dtype.itemsize < 2:
        raise FormatError(f"{name} is {scale.dtype}; float32, bfloat16 or float16 is expected")
    if not bool(scale.isfinite().all()):
        raise FormatError(f"{name} holds NaN or infinity")
    return reshape(name, scale, shape)


class _Config(msgspec.Struct):
    """Types of the keys that mean something; for checking only."""

    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    fmt: str | None = None
    weight_block_size: list[int] | None = None
    ignored_layers: list[str] | None = None
    modules_to_not_convert: list[str] | None = None
    scale_fmt: str | None = None
    kv_cache_scheme: str | dict[str, object] | None = None


@dataclass(frozen=True)
class Fp8Config:
    """One scheme for the quantized layers: those that have scales, or without files, those that aren't ignored."""

    scheme: QuantScheme
    ignored: tuple[str, ...]
    kv_cache: str | None = None
    name: str = "fp8"

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> Fp8Format | None:
        """The format of a linear layer, given its full name; None if it is not quantized."""
        if suffixes is None:
            listed = any(module == name or module.startswith(f"{name}.") for name in self.ignored)
            return None if listed or NEVER_QUANTIZED.search(module) else Fp8Format(self.scheme)
        return Fp8Format(self.scheme) if any(name in suffixes for name in WEIGHT_SCALES) else None


def parse_fp8(raw: Mapping[str, Any]) -> Fp8Config:
    """A config.json's `quantization_config` with quant_method fp8. Raises FormatError."""
    config = check_types({key: value for key, value in raw.items() if value is not None}, _Config)
    if config.fmt not in (None, "e4m3", "float8_e4m3fn"):
        raise FormatError(f"fmt {config.fmt!r} is not supported; e4m3 is")
    if config.scale_fmt not in (None, "float", UE8M0):
        raise FormatError(f"scale_fmt {config.scale_fmt!r} is not supported; float and {UE8M0} are")
    ignored = tuple(config.ignored_layers or config.modules_to_not_convert or ())
    kv_cache = "fp8_e4m3" if config.kv_cache_scheme else None
    return Fp8Config(_scheme(config), ignored, kv_cache)


def _scheme(config: _Config) -> QuantScheme:
    static = config.activation_scheme == "static"
    if config.weight_block_size is None:
        if config.scale_fmt == UE8M0:
            raise FormatError(f"scale_fmt {UE8M0} without weight_block_size: powers of two are scales of blocks")
        activation = ActivationScheme("fp8_e4m3", TENSOR if static else CHANNEL, dynamic=not static)
        return QuantScheme(WeightScheme("fp8_e4m3", TENSOR), activation)
    size = config.weight_block_size
    if len(size) != 2 or min(size) < 1:
        raise FormatError(f"weight_block_size {size} is not two sizes")
    if static:
        raise FormatError("activation_scheme static with weight_block_size: static scales are for whole tensors")
    weight = WeightScheme("fp8_e4m3", Granularity("block", block=(size[0], size[1])))
    scales: Scales = "ue8m0" if config.scale_fmt == UE8M0 else "float"
    return QuantScheme(weight, ActivationScheme("fp8_e4m3", group(size[1]), scales=scales))


def check_writable(scheme: QuantScheme) -> None:
    """Raise FormatError with the reason if native FP8 can't express a scheme."""
    weight = scheme.weight
    activation = scheme.activation
    if weight.dtype != "fp8_e4m3":
        raise FormatError(f"native fp8 has fp8_e4m3 weights, not {weight.dtype}; compressed-tensors carries {scheme}")
    block = weight.granularity.block
    if block is not None:
        wanted: tuple[ActivationScheme, ...] = (
            ActivationScheme("fp8_e4m3", group(block[1])),
            ActivationScheme("fp8_e4m3", group(block[1]), scales="ue8m0"),
        )
    elif weight.granularity == TENSOR:
        wanted = (ActivationScheme("fp8_e4m3", TENSOR, dynamic=False), ActivationScheme("fp8_e4m3", CHANNEL))
    else:
        raise FormatError(f"native fp8 scales per block or tensor, not per {weight.granularity}: FP8_BLOCK fits")
    if activation not in wanted:
        raise FormatError(f"native fp8 can't express {scheme}; compressed-tensors can")


def write_fp8_config(schemes: QuantScheme | Mapping[str, QuantScheme], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; every linear layer but those in `ignore` has the one scheme.

    Names are ignored, and regexes ('re:...') left out: the format has no word for them.

    Raises FormatError for several schemes, and for one that native FP8 can't express.
    """
    distinct = {schemes} if isinstance(schemes, QuantScheme) else set(schemes.values())
    if len(distinct) != 1:
        raise FormatError(
            f"native fp8 has one scheme for all layers, not {len(distinct)} "
            f"({', '.join(sorted(str(scheme) for scheme in distinct))}); compressed-tensors has one for each"
        )
    scheme = distinct.pop()
    check_writable(scheme)
    block = scheme.weight.granularity.block
    activation = scheme.activation
    static = activation is not None and activation.has_stored_scale
    return {
        "activation_scheme": "static" if static else "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": [module for module in ignore if not module.startswith("re:")],
        "quant_method": "fp8",
        "weight_block_size": None if block is None else list(block),
        **({"scale_fmt": UE8M0} if activation is not None and activation.scales == "ue8m0" else {}),
    }
