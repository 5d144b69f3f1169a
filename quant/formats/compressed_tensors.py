"""compressed-tensors, as llm-compressor writes it, and vLLM and transformers read it. octavo's default format.

Source: vllm-project/compressed-tensors, `quantization/quant_args.py`, `compressors/pack_quantized`,
`compressors/naive_quantized`. Two layouts of a linear layer [N, K] with b-bit weights:

packed  weight_packed [N, ceil(K b / 32)] int32, along K; weight_scale [N, K / g] or [N, 1]; weight_shape [2] int64;
        asymmetric: weight_zero_point [ceil(N b / 32), K / g] int32, packed along N. Fields are unsigned.
plain   weight [N, K] int8 or float8_e4m3fn; weight_scale [N, 1], [N, K / g], [1] or [N / rows, K / cols]; asymmetric:
        weight_zero_point int8 of weight_scale's shape; static activations: input_scale [1].

The tensors' names tell which of the two a layer has. The config's `format` doesn't: writers of different ages disagree
about it (a W4A8 layer occurs in either).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.quant.embedding_names import is_embedding
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.microscaling import MicroscalingFormat, kind_of
from octavo.quant.formats.reading import check_input_scale, check_nothing_left, reshape, sides, take
from octavo.quant.packing import is_padded, pack, packed_columns, unpack
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import BITS, KVScheme, QuantScheme

Layout = Literal["packed", "plain"]
SCALE_DTYPES = {"float": None, "e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}  # as the config spells them
SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """Converts one layer's tensors, keyed by suffix, to and from the canonical weight.

    scale_dtype is for writing; a scale that is read keeps the type that it is stored in.
    act_order: columns have their groups from weight_g_idx (actorder "group").
    Floats with 8-bit scales lie otherwise: `format_for` knows.
    """

    scheme: QuantScheme
    scale_dtype: torch.dtype = torch.bfloat16
    act_order: bool = False

    def __post_init__(self) -> None:
        w = self.scheme.weight
        if w.dtype == "fp4_e2m1" or w.scales != "float":
            raise FormatError(f"{self.scheme} has no place in the layouts of integers and fp8")
        if self.scheme.activation is not None and self.scheme.activation.scales == "ue8m0":
            raise FormatError(
                f"{self.scheme}: compressed-tensors has no word for such scales of inputs; native fp8 has"
            )

    @property
    def layout(self) -> Layout:
        """The layout to write, as vLLM reads it: packed for weight-only integers, and for int4 with fp8 input."""
        w = self.scheme.weight
        a = self.scheme.activation
        if w.is_float:
            return "plain"
        return "packed" if a is None or (a.dtype == "fp8_e4m3" and w.bits < 8) else "plain"

    @property
    def name(self) -> str:
        """What compressed-tensors calls it."""
        if self.layout == "packed":
            return "pack-quantized"
        if self.scheme.activation is None:
            return "naive-quantized"
        return "float-quantized" if self.scheme.weight.is_float else "int-quantized"

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, types and shapes of the tensors that `write` returns for a weight of this shape."""
        n = out_features
        k = in_features
        w = self.scheme.weight
        scale_shape = w.granularity.scale_shape(n, k)
        # One scale for all is stored as [1]; vLLM's loader takes no [1, 1].
        specs = {"weight_scale": TensorSpec(self.scale_dtype, (1,) if w.granularity.kind == "tensor" else scale_shape)}
        if self.layout == "packed":
            specs["weight_packed"] = TensorSpec(torch.int32, (n, packed_columns(k, w.bits)))
            specs["weight_shape"] = TensorSpec(torch.int64, (2,))
            if not w.symmetric:
                specs["weight_zero_point"] = TensorSpec(torch.int32, (packed_columns(n, w.bits), scale_shape[1]))
        else:
            specs["weight"] = TensorSpec(torch.float8_e4m3fn if w.is_float else torch.int8, (n, k))
            if not w.symmetric:
                specs["weight_zero_point"] = TensorSpec(torch.int8, specs["weight_scale"].shape)
        if self.act_order:
            specs["weight_g_idx"] = TensorSpec(torch.int32, (k,))
        if self.scheme.activation is not None and not self.scheme.activation.dynamic:
            specs["input_scale"] = TensorSpec(self.scale_dtype, (1,))
        return specs

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        if "weight_packed" in tensors:
            return read_shape(take(dict(tensors), "weight_shape"))
        return sides(tensors, "weight")

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `tensors` announced. Raises FormatError when one can't be had."""
        self._check_writable(weight)
        n, k = weight.shape
        bits = self.scheme.weight.bits
        specs = self.tensors(n, k)
        out = {"weight_scale": weight.scale.to(self.scale_dtype).reshape(specs["weight_scale"].shape)}
        if self.layout == "packed":
            out["weight_packed"] = pack(weight.codes, bits)
            out["weight_shape"] = torch.tensor([n, k])
            if weight.zero_point is not None:
                out["weight_zero_point"] = pack(weight.zero_point.t().contiguous(), bits).t().contiguous()
        else:
            out["weight"] = weight.codes
            if weight.zero_point is not None:
                out["weight_zero_point"] = weight.zero_point.reshape(specs["weight_zero_point"].shape)
        if weight.g_idx is not None:
            out["weight_g_idx"] = weight.g_idx.int()
        if "input_scale" in specs and weight.input_scale is not None:
            out["input_scale"] = weight.input_scale.to(self.scale_dtype).reshape(1)
        return out

    def _check_writable(self, weight: QuantizedWeight) -> None:
        activation = self.scheme.activation
        if activation is not None and not activation.dynamic and weight.input_scale is None:
            raise FormatError(
                f"{self.scheme} needs an input_scale, which only calibration gives; FP8_DYNAMIC needs none"
            )
        if self.act_order and weight.g_idx is None:
            raise FormatError("actorder 'group' is announced, but the weight has no g_idx")
        if weight.g_idx is not None and not self.act_order:
            raise FormatError("the weight has a g_idx: only actorder 'group' (act_order=True) can say so")

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight out of a layer's tensors, whichever layout they are in.

        Raises FormatError when one is missing, left over, or of another shape or type than the scheme says.
        """
        left = dict(tensors)
        codes = self._read_codes(left)
        n, k = codes.shape
        scale_shape = self.scheme.weight.granularity.scale_shape(n, k)
        scale = take(left, "weight_scale")
        if not scale.is_floating_point():
            raise FormatError(f"weight_scale is {scale.dtype}, which this scheme ({self.scheme}) doesn't have")
        if not bool(scale.float().isfinite().all()):
            raise FormatError("weight_scale holds NaN or infinity")
        weight = QuantizedWeight(
            scheme=self.scheme,
            codes=codes,
            scale=reshape("weight_scale", scale, scale_shape),
            zero_point=self._read_zero_point(left, n, k, scale_shape, tensors.get("weight_packed")),
            g_idx=self._read_g_idx(left, k, scale_shape[1]),
            input_scale=self._read_input_scale(left),
        )
        check_nothing_left(left, f"with scheme {self.scheme}")
        return weight

    def _read_codes(self, left: dict[str, Tensor]) -> Tensor:
        w = self.scheme.weight
        if "weight_packed" in left:
            words = left.pop("weight_packed")
            n, k = read_shape(take(left, "weight_shape"))
            if words.dtype != torch.int32 or words.ndim != 2 or words.shape[0] != n or w.is_float:
                raise FormatError(f"weight_packed is {words.dtype} {list(words.shape)} for {w.dtype} [{n}, {k}]")
            try:
                return unpack(words, w.bits, k)
            except ValueError as e:
                raise FormatError(f"weight_packed: {e}") from e
        codes = take(left, "weight")
        expected = torch.float8_e4m3fn if w.is_float else torch.int8
        if codes.dtype != expected or codes.ndim != 2:
            raise FormatError(f"weight is {codes.dtype} {list(codes.shape)}; {self.scheme} stores {expected} [N, K]")
        if not w.is_float and w.bits < 8:
            low, high = (int(x) for x in codes.aminmax())
            if low < w.int_range[0] or high > w.int_range[1]:
                raise FormatError(f"weight holds {low}..{high}; {w.dtype} has {w.int_range[0]}..{w.int_range[1]}")
        return codes

    def _read_zero_point(
        self, left: dict[str, Tensor], n: int, k: int, scale_shape: tuple[int, int], packed: Tensor | None
    ) -> Tensor | None:
        if self.scheme.weight.symmetric:
            stored = left.pop("weight_zero_point", None)
            if stored is not None and bool(stored.float().any()):
                raise FormatError("weight_zero_point is not zero although the scheme is symmetric")
            return None
        stored = take(left, "weight_zero_point")
        if packed is not None and stored.dtype == torch.int32:
            if stored.ndim != 2:
                raise FormatError(f"weight_zero_point is {list(stored.shape)}; a matrix is expected")
            bits = self.scheme.weight.bits
            padded = is_padded(packed, bits, k)  # as the weight is: its words tell more surely than these few
            try:
                zero_point = unpack(stored.t(), bits, n, padded=padded).t().contiguous()
            except ValueError as e:
                raise FormatError(f"weight_zero_point: {e}") from e
            return reshape("weight_zero_point", zero_point, scale_shape)
        if stored.dtype != torch.int8:
            raise FormatError(f"weight_zero_point is {stored.dtype}; int8, or int32 when packed, is expected")
        return reshape("weight_zero_point", stored, scale_shape)

    def _read_g_idx(self, left: dict[str, Tensor], k: int, num_groups: int) -> Tensor | None:
        g_idx = left.pop("weight_g_idx", None)
        if g_idx is None:
            if self.act_order and num_groups > 1:
                raise FormatError("weight_g_idx is missing although actorder is 'group'")
            return None
        g_idx = reshape("weight_g_idx", g_idx, (k,)).int()
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= num_groups:
            raise FormatError(f"weight_g_idx points outside the {num_groups} groups")
        return g_idx

    def _read_input_scale(self, left: dict[str, Tensor]) -> Tensor | None:
        zero_point = left.pop("input_zero_point", None)
        if zero_point is not None and bool(zero_point.float().any()):
            raise FormatError("input_zero_point is not zero: asymmetric activations are not supported")
        if self.scheme.activation is None or self.scheme.activation.dynamic:
            return None
        return check_input_scale(reshape("input_scale", take(left, "input_scale").float(), ()))


def format_for(scheme: QuantScheme, scale_dtype: torch.dtype) -> CompressedTensorsFormat | MicroscalingFormat:
    """The format of a layer with a scheme, whose scales are of a type where the scheme has any number."""
    if kind_of(scheme.weight) is not None:
        return MicroscalingFormat(scheme)
    return CompressedTensorsFormat(scheme, scale_dtype)


def read_shape(stored: Tensor) -> tuple[int, int]:
    """The [N, K] that a `weight_shape` holds. Raises FormatError when it is none."""
    sizes = stored.tolist()
    if stored.is_floating_point() or stored.shape != (2,) or min(sizes) < 1:
        raise FormatError(f"weight_shape is {sizes}; two sizes are expected")
    return sizes[0], sizes[1]


def write_config(
    schemes: QuantScheme | Mapping[str, QuantScheme],
    ignore: list[str],
    observer: str,
    kv_cache: KVScheme | None = None,
    actorder: Literal["group", "static"] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json. Keys, their spelling and the nulls are compressed-tensors 0.19's own.

    schemes: one for all linear layers but those in `ignore`, or each layer's by its full name; layers in neither must
    not be. Several schemes make several groups, whose targets are never the class Linear: vLLM looks for a class
    before it looks for the parts of a fused layer. Embeddings, of one scheme, are their class: vLLM doesn't tell each
    of its models their names.
    kv_cache with bf16 keys is not written, as the config has no word for it and others would store keys in fp8:
    values are then taken to be fp8 by the v_scale that stands without a k_scale, and nothing else can be said so.
    actorder 'group' (weights with g_idx) is read by vLLM; compressed-tensors 0.19 and 0.20 refuse such a config.
    """
    groups: dict[str, Any] = {}
    if isinstance(schemes, QuantScheme):
        groups["group_0"] = _group(schemes, ["Linear"], observer, actorder)
    else:
        targets = scheme_targets({m: scheme for m, scheme in schemes.items() if not is_embedding(m)})
        for scheme, names in targets.items():
            named = ["Linear"] if len(targets) == 1 else names
            groups[f"group_{len(groups)}"] = _group(scheme, named, observer, actorder)
        for scheme in {scheme for module, scheme in schemes.items() if is_embedding(module)}:
            groups[f"group_{len(groups)}"] = _group(scheme, ["Embedding"], observer, None)
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": _kv_cache_args(kv_cache),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def scheme_targets(schemes: Mapping[str, QuantScheme]) -> dict[QuantScheme, list[str]]:
    """Targets of each scheme: a regex for layers that differ in their numbers only, names where those differ."""
    kinds: dict[str, dict[str, QuantScheme]] = {}
    for module, scheme in schemes.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "#", module)
        kinds.setdefault(kind, {})[module] = scheme
    targets: dict[QuantScheme, list[str]] = {}
    for kind, modules in kinds.items():
        if len(set(modules.values())) == 1 and "#" in kind:
            pattern = "re:" + re.escape(kind).replace(r"\#", r"\d+") + "$"
            targets.setdefault(next(iter(modules.values())), []).append(pattern)
        else:
            for module, scheme in modules.items():
                targets.setdefault(scheme, []).append(module)
    return targets


def _group(
    scheme: QuantScheme, targets: list[str], observer: str, actorder: Literal["group", "static"] | None
) -> dict[str, Any]:
    """One entry of config_groups."""
    w = scheme.weight
    a = scheme.activation
    weights = _args(
        actorder=actorder,
        num_bits=w.bits,
        type="float" if w.is_float else "int",
        symmetric=w.symmetric,
        strategy="tensor_group" if w.scales == "e4m3" else w.granularity.kind,
        group_size=w.granularity.group_size,
        block_structure=None if w.granularity.block is None else list(w.granularity.block),
        observer=observer,
        scale_dtype=SCALE_DTYPES[w.scales],
        zp_dtype=None if w.symmetric else "torch.int8",
    )
    inputs = None
    if a is not None:
        strategy = "token" if a.granularity.kind == "channel" else a.granularity.kind
        inputs = _args(
            num_bits=BITS[a.dtype],
            type="int" if a.dtype == "int8" else "float",
            strategy="tensor_group" if a.scales == "e4m3" else strategy,
            group_size=a.granularity.group_size,
            dynamic="local" if a.scales == "e4m3" else a.dynamic,
            observer="static_minmax" if a.has_stored_scale else None,
            scale_dtype=SCALE_DTYPES[a.scales],
        )
    return {
        "format": format_for(scheme, torch.bfloat16).name,
        "input_activations": inputs,
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def _kv_cache_args(kv_cache: KVScheme | None) -> dict[str, Any] | None:
    if kv_cache is None or kv_cache.key == "bf16":
        if kv_cache is not None and kv_cache.value != "fp8_e4m3":
            raise FormatError(f"KV cache {kv_cache}: beside bf16 keys only fp8_e4m3 values can be told from the file")
        return None
    if kv_cache.value != kv_cache.key:
        raise FormatError(f"KV cache {kv_cache}: bf16 values beside 8-bit keys can't be written")
    return _args(
        num_bits=8,
        type="float" if kv_cache.key == "fp8_e4m3" else "int",
        strategy="attn_head" if kv_cache.per_head else "tensor",
    )


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
