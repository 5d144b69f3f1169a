"""compressed-tensors: what llm-compressor writes and vLLM and transformers read. The format that octavo writes.

Source: vllm-project/compressed-tensors, `quantization/quant_args.py`, `compressors/pack_quantized`,
`compressors/naive_quantized`. Two layouts of a linear layer [N, K] with b-bit weights:

packed  weight_packed [N, ceil(K b / 32)] int32, along K; weight_scale [N, K / g] or [N, 1]; weight_shape [2] int64;
        asymmetric: weight_zero_point [ceil(N b / 32), K / g] int32, packed along N. Fields are unsigned.
plain   weight [N, K] int8 or float8_e4m3fn; weight_scale [N, 1], [N, K / g], [1] or [N / rows, K / cols]; asymmetric:
        weight_zero_point int8 of weight_scale's shape; static activations: input_scale [1].

Which of the two a layer has is told by its tensors' names and not by the config's `format`, which writers of
different ages disagree about (a W4A8 layer is found in either).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError
from octavo.quant.packing import pack, packed_columns, unpack
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import QuantScheme

Layout = Literal["packed", "plain"]
SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """One layer's tensors, by their names after the module's, to and from the canonical weight.

    scale_dtype is for writing; what is read keeps the type that it was stored in.
    """

    scheme: QuantScheme
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def layout(self) -> Layout:
        """The layout to write: packed for weight-only integers, as every writer does."""
        return "packed" if self.scheme.activation is None and self.scheme.weight.dtype != "fp8_e4m3" else "plain"

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """What `write` will return for a weight of this shape."""
        n, k, w = out_features, in_features, self.scheme.weight
        scale_shape = w.granularity.scale_shape(n, k)
        # One scale for all is stored as [1]; vLLM's loader takes no [1, 1].
        specs = {"weight_scale": TensorSpec(self.scale_dtype, (1,) if w.granularity.kind == "tensor" else scale_shape)}
        if self.layout == "packed":
            specs["weight_packed"] = TensorSpec(torch.int32, (n, packed_columns(k, w.bits)))
            specs["weight_shape"] = TensorSpec(torch.int64, (2,))
            if not w.symmetric:
                specs["weight_zero_point"] = TensorSpec(torch.int32, (packed_columns(n, w.bits), scale_shape[1]))
            return specs
        specs["weight"] = TensorSpec(torch.float8_e4m3fn if w.dtype == "fp8_e4m3" else torch.int8, (n, k))
        if not w.symmetric:
            specs["weight_zero_point"] = TensorSpec(torch.int8, specs["weight_scale"].shape)
        if self.scheme.activation is not None and not self.scheme.activation.dynamic:
            specs["input_scale"] = TensorSpec(self.scale_dtype, (1,))
        return specs

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `tensors` announced."""
        if weight.g_idx is not None:
            raise FormatError("g_idx (activation order by group) can't be written: compressed-tensors removed it")
        if "input_scale" in (specs := self.tensors(*weight.shape)) and weight.input_scale is None:
            raise FormatError(
                f"{self.scheme} needs an input_scale, which only calibration gives; FP8_DYNAMIC needs none"
            )
        n, k = weight.shape
        bits = self.scheme.weight.bits
        out = {"weight_scale": weight.scale.to(self.scale_dtype).reshape(specs["weight_scale"].shape)}
        if self.layout == "packed":
            out["weight_packed"] = pack(weight.codes, bits)
            out["weight_shape"] = torch.tensor([n, k])
            if weight.zero_point is not None:
                out["weight_zero_point"] = pack(weight.zero_point.t().contiguous(), bits).t().contiguous()
            return out
        out["weight"] = weight.codes
        if weight.zero_point is not None:
            out["weight_zero_point"] = weight.zero_point.reshape(specs["weight_zero_point"].shape)
        if weight.input_scale is not None:
            out["input_scale"] = weight.input_scale.to(self.scale_dtype).reshape(1)
        return out

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight out of a layer's tensors, whichever layout they are in.

        Raises FormatError when one is missing, left over, or of another shape or type than the scheme says.
        """
        left = dict(tensors)
        codes = self._read_codes(left)
        n, k = codes.shape
        scale_shape = self.scheme.weight.granularity.scale_shape(n, k)
        scale = _take(left, "weight_scale")
        if not scale.is_floating_point():
            raise FormatError(f"weight_scale is {scale.dtype}, which this scheme ({self.scheme}) doesn't have")
        if not bool(scale.float().isfinite().all()):
            raise FormatError("weight_scale holds NaN or infinity")
        weight = QuantizedWeight(
            scheme=self.scheme,
            codes=codes,
            scale=_reshape("weight_scale", scale, scale_shape),
            zero_point=self._read_zero_point(left, n, scale_shape, packed="weight_packed" in tensors),
            g_idx=self._read_g_idx(left, k, scale_shape[1]),
            input_scale=self._read_input_scale(left),
        )
        if left:
            raise FormatError(f"{', '.join(sorted(left))} not expected with scheme {self.scheme}")
        return weight

    def _read_codes(self, left: dict[str, Tensor]) -> Tensor:
        w = self.scheme.weight
        if "weight_packed" in left:
            words, (n, k) = left.pop("weight_packed"), read_shape(_take(left, "weight_shape"))
            if words.dtype != torch.int32 or words.ndim != 2 or words.shape[0] != n or w.dtype == "fp8_e4m3":
                raise FormatError(f"weight_packed is {words.dtype} {list(words.shape)} for {w.dtype} [{n}, {k}]")
            try:
                return unpack(words, w.bits, k)
            except ValueError as e:
                raise FormatError(f"weight_packed: {e}") from e
        codes = _take(left, "weight")
        expected = torch.float8_e4m3fn if w.dtype == "fp8_e4m3" else torch.int8
        if codes.dtype != expected or codes.ndim != 2:
            raise FormatError(f"weight is {codes.dtype} {list(codes.shape)}; {self.scheme} stores {expected} [N, K]")
        if w.dtype != "fp8_e4m3" and w.bits < 8:
            low, high = (int(x) for x in codes.aminmax())
            if low < w.int_range[0] or high > w.int_range[1]:
                raise FormatError(f"weight holds {low}..{high}; {w.dtype} has {w.int_range[0]}..{w.int_range[1]}")
        return codes

    def _read_zero_point(
        self, left: dict[str, Tensor], n: int, scale_shape: tuple[int, int], packed: bool
    ) -> Tensor | None:
        if self.scheme.weight.symmetric:
            stored = left.pop("weight_zero_point", None)
            if stored is not None and bool(stored.float().any()):
                raise FormatError("weight_zero_point is not zero although the scheme is symmetric")
            return None
        stored = _take(left, "weight_zero_point")
        if packed and stored.dtype == torch.int32:
            try:
                return unpack(stored.t(), self.scheme.weight.bits, n).t().contiguous()
            except ValueError as e:
                raise FormatError(f"weight_zero_point: {e}") from e
        if stored.dtype != torch.int8:
            raise FormatError(f"weight_zero_point is {stored.dtype}; int8, or int32 when packed, is expected")
        return _reshape("weight_zero_point", stored, scale_shape)

    def _read_g_idx(self, left: dict[str, Tensor], k: int, num_groups: int) -> Tensor | None:
        g_idx = left.pop("weight_g_idx", None)
        if g_idx is None:
            return None
        g_idx = _reshape("weight_g_idx", g_idx, (k,)).int()
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= num_groups:
            raise FormatError(f"weight_g_idx points outside the {num_groups} groups")
        return g_idx

    def _read_input_scale(self, left: dict[str, Tensor]) -> Tensor | None:
        zero_point = left.pop("input_zero_point", None)
        if zero_point is not None and bool(zero_point.float().any()):
            raise FormatError("input_zero_point is not zero: asymmetric activations are not supported")
        if self.scheme.activation is None or self.scheme.activation.dynamic:
            return None
        scale = _reshape("input_scale", _take(left, "input_scale").float(), ())
        if not 0 < float(scale) < math.inf:
            raise FormatError(f"input_scale is {float(scale)}; a positive number is needed")
        return scale


def read_shape(stored: Tensor) -> tuple[int, int]:
    """The [N, K] that a `weight_shape` holds. Raises FormatError when it is none."""
    sizes = stored.tolist()
    if stored.is_floating_point() or stored.shape != (2,) or min(sizes) < 1:
        raise FormatError(f"weight_shape is {sizes}; two sizes are expected")
    return sizes[0], sizes[1]


def _take(left: dict[str, Tensor], name: str) -> Tensor:
    tensor = left.pop(name, None)
    if tensor is None:
        raise FormatError(f"{name} is missing")
    return tensor


def _reshape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` in `shape`, allowing only sides of 1 to come and go: [N] for [N, 1], [1] for []."""
    if [s for s in tensor.shape if s != 1] != [s for s in shape if s != 1]:
        raise FormatError(f"{name} is {list(tensor.shape)} where {list(shape)} is expected")
    return tensor.reshape(shape)


def write_config(scheme: QuantScheme, ignore: list[str], observer: str) -> dict[str, Any]:
    """The `quantization_config` of config.json for a model whose linear layers, `ignore` aside, have `scheme`.

    Keys, their spelling and the nulls are those that compressed-tensors 0.19 itself writes.
    """
    w, a = scheme.weight, scheme.activation
    layout = CompressedTensorsFormat(scheme).layout
    name = "pack-quantized" if layout == "packed" else "float-quantized" if w.dtype == "fp8_e4m3" else "int-quantized"
    if a is None and layout == "plain":
        name = "naive-quantized"
    weights = _args(
        num_bits=w.bits,
        type="float" if w.dtype == "fp8_e4m3" else "int",
        symmetric=w.symmetric,
        strategy=w.granularity.kind,
        group_size=w.granularity.group_size,
        block_structure=None if w.granularity.block is None else list(w.granularity.block),
        observer=observer,
        zp_dtype=None if w.symmetric else "torch.int8",
    )
    inputs = None
    if a is not None:
        inputs = _args(
            num_bits=8,
            type="float" if a.dtype == "fp8_e4m3" else "int",
            strategy="token" if a.granularity.kind == "channel" else a.granularity.kind,
            group_size=a.granularity.group_size,
            dynamic=a.dynamic,
        )
    group = {
        "format": name,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": name,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def _args(**given: Any) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs, its defaults filled in."""
    defaults: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": None,
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
    return defaults | given
