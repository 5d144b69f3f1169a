"""AWQ, as AutoAWQ, GPTQModel and AutoRound write it, and vLLM, SGLang and transformers read it. 4 bits only.

Source: casper-hansen/AutoAWQ, `modules/linear/gemm.py`, `gemv.py`, `models/_config.py`. A layer [N, K] with G groups:

gemm    qweight [K, N / 8] int32, packed along N, qzeros [G, N / 8] alike, scales [G, N] float16. Field i of a word (its
        bits 4 i to 4 i + 3) is column ORDER[i] of the word's eight.
gemv    qweight [N, K / 8] int32, packed along K in order; qzeros [N, Z] and scales [N, 8 Z] along the groups, Z wide
        enough for them and padded. Read, never written.

Fields are unsigned, and zero points are stored as they are. Old files keep their config in quant_config.json, with
other keys (w_bit, q_group_size).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from octavo.quant.formats.config_reading import check_types, first_given
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.gptq_config import IN_BLOCK
from octavo.quant.formats.reading import check_nothing_left, check_shape, exactly, sides, take_scales, take_words
from octavo.quant.packing import pack, unpack
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import QuantScheme, SchemeError, WeightScheme, group

Layout = Literal["gemm", "gemv"]
SUFFIXES = ("qweight", "qzeros", "scales")
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
PLACE = [ORDER.index(column) for column in range(8)]  # the field of each column


@dataclass(frozen=True)
class AWQFormat:
    """Converts one layer's tensors, keyed by suffix, to and from the canonical weight.

    scale_dtype is for writing; a scale that is read keeps the type that it is stored in.
    """

    scheme: QuantScheme
    layout: Layout = "gemm"
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        w = self.scheme.weight
        if w.dtype != "int4" or self.scheme.activation is not None or w.granularity.kind not in ("channel", "group"):
            raise FormatError(
                f"awq holds 4-bit integers in groups and doesn't quantize activations; it can't hold {self.scheme}"
            )

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """What `write` will return for a weight of this shape. Raises FormatError where its sides don't fit."""
        n = out_features
        k = in_features
        size = self.scheme.weight.granularity.group_size
        if self.layout != "gemm":
            raise FormatError(f"awq is written in the gemm layout, not {self.layout}")
        if n % 8:
            raise FormatError(f"out_features {n} is not a multiple of 8, as awq's words need")
        if size is not None and k % size:
            raise FormatError(f"in_features {k} is not a multiple of group_size {size}: awq has no short last group")
        groups = self.scheme.weight.granularity.scale_shape(n, k)[1]
        return {
            "qweight": TensorSpec(torch.int32, (k, n // 8)),
            "qzeros": TensorSpec(torch.int32, (groups, n // 8)),
            "scales": TensorSpec(self.scale_dtype, (groups, n)),
        }

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        rows, words = sides(tensors, "qweight")
        return (words * 8, rows) if self.layout == "gemm" else (rows, words * 8)

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `tensors` announced; a symmetric layer's zero points are all 8.

        Raises FormatError for what the format can't carry.
        """
        self.tensors(*weight.shape)
        if weight.scheme != self.scheme:
            raise FormatError(f"a weight of {weight.scheme} can't be written as {self.scheme}")
        if weight.g_idx is not None:
            raise FormatError("its groups are not in the order of its columns (desc_act), which awq has no g_idx for")
        zeros = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
        return {
            "qweight": _pack(weight.codes.t()),
            "qzeros": _pack(zeros.t()),
            "scales": exactly(weight.scale, self.scale_dtype).t().contiguous(),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight. Raises FormatError if a tensor is missing, unexpected, or not as the scheme says."""
        left = dict(tensors)
        words = take_words(left, "qweight")
        qzeros = take_words(left, "qzeros")
        scale = take_scales(left, "scales")
        check_nothing_left(left, "beside awq's qweight")
        read = self._read_gemm if self.layout == "gemm" else self._read_gemv
        codes, scale, zeros = read(words, qzeros, scale)
        if not self.scheme.weight.symmetric:
            return QuantizedWeight(self.scheme, codes, scale, zeros)
        if bool(zeros.any()):
            raise FormatError("qzeros are not all 8 although zero_point is false; with zero_point true they are used")
        return QuantizedWeight(self.scheme, codes, scale)

    def _read_gemm(self, words: Tensor, qzeros: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k = words.shape[0]
        n = words.shape[1] * 8
        groups = self.scheme.weight.granularity.scale_shape(n, k)[1]
        why = f"of qweight {list(words.shape)} in the gemm layout and {self.scheme}"
        check_shape("scales", scale, (groups, n), why)
        check_shape("qzeros", qzeros, (groups, n // 8), why)
        return unpack_fields(words).t().contiguous(), scale.t().contiguous(), unpack_fields(qzeros).t().contiguous()

    def _read_gemv(self, words: Tensor, qzeros: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = words.shape[0]
        k = words.shape[1] * 8
        groups = self.scheme.weight.granularity.scale_shape(n, k)[1]
        width = qzeros.shape[1]
        if 8 * width < groups or qzeros.shape[0] != n:
            raise FormatError(f"qzeros is {list(qzeros.shape)} for [{n}, {k}] and {groups} groups in the gemv layout")
        check_shape("scales", scale, (n, 8 * width), f"of qzeros {list(qzeros.shape)} in the gemv layout")
        zeros = unpack(qzeros, 4, 8 * width)[:, :groups].contiguous()
        return unpack(words, 4, k), scale[:, :groups].contiguous(), zeros


def _pack(codes: Tensor) -> Tensor:
    """[rows, columns] int8, signed, to [rows, columns / 8] int32."""
    rows, columns = codes.shape
    return pack(codes.reshape(rows, columns // 8, 8)[:, :, ORDER].reshape(rows, columns), 4)


def unpack_fields(words: Tensor) -> Tensor:
    """[rows, words] int32 in AWQ's order of fields to [rows, 8 words] int8, signed; the inverse of `_pack`."""
    rows = words.shape[0]
    columns = words.shape[1] * 8
    return unpack(words, 4, columns).view(rows, columns // 8, 8)[:, :, PLACE].reshape(rows, columns)


class _Config(msgspec.Struct):
    """The types of the keys, for checking only; the first two keys have two spellings."""

    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    zero_point: bool | None = None
    sym: bool | None = None
    version: str | None = None
    format: str | None = None
    checkpoint_format: str | None = None
    backend: str | None = None
    modules_to_not_convert: list[str] | None = None
    lm_head: bool | None = None


@dataclass(frozen=True)
class AWQConfig:
    """One scheme for all layers. The tensors tell which layers are quantized, as with GPTQ (see gptq_config.py).

    unconverted: parts of the names of layers that aren't quantized, used if there are no files
    """

    format: AWQFormat
    unconverted: tuple[str, ...] = ()
    lm_head: bool = False
    name: str = "awq"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> AWQFormat | None:
        """The format of a linear layer, given its full name; None if it is not quantized."""
        if suffixes is not None:
            return self.format if "qweight" in suffixes else None
        kept = any(part in module for part in self.unconverted)
        quantized = self.lm_head if module.endswith("lm_head") else bool(IN_BLOCK.search(module))
        return self.format if quantized and not kept else None


def parse_awq(raw: Mapping[str, Any]) -> AWQConfig:
    """A `quantization_config` with quant_method awq, or a quant_config.json. Raises FormatError."""
    config = check_types(raw, _Config)
    bits = first_given(config.bits, config.w_bit)
    size = first_given(config.group_size, config.q_group_size)
    if bits is None or size is None:
        raise FormatError("quantization_config: awq needs bits (or w_bit) and group_size (or q_group_size)")
    if config.backend and config.backend.lower() != "autoawq":
        raise FormatError(f"awq backend {config.backend!r} packs in another layout, which is not supported")
    if raw.get("dynamic"):
        raise FormatError("quantization_config: dynamic overrides are not supported with awq")
    zero_point = first_given(config.zero_point, None if config.sym is None else not config.sym, True)
    assert zero_point is not None
    version = (config.version or config.checkpoint_format or config.format or "gemm").lower()
    made = make_awq(bits, size, zero_point, version, "")
    return AWQConfig(made, tuple(config.modules_to_not_convert or ()), bool(config.lm_head))


def make_awq(bits: int, group_size: int, zero_point: bool, version: str, where: str) -> AWQFormat:
    """The format of a layer with these settings. Raises FormatError, whose message begins with `where`."""
    if version not in ("gemm", "gemv"):
        raise FormatError(f"{where}awq version {version!r} is not supported; gemm and gemv are")
    if bits != 4:
        raise FormatError(f"{where}awq with {bits} bits is not supported; 4 bits are")
    try:
        scheme = QuantScheme(WeightScheme("int4", group(group_size), symmetric=not zero_point))
    except SchemeError as e:
        raise FormatError(f"{where}{e}") from e
    return AWQFormat(scheme, "gemm" if version == "gemm" else "gemv")


def write_awq_config(schemes: QuantScheme | Mapping[str, QuantScheme], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. Source of the keys: AutoAWQ, `models/_config.py`.

    schemes: one for all linear layers but those in `ignore`, or each layer's by its full name, with one group size.
    Readers take zero points from qzeros in any case, so zero_point is true for symmetric schemes too. They match
    modules_to_not_convert as parts of names, so that regexes ('re:...') are left out; lm_head alone needs no entry, and
    vLLM then looks at the tensors instead.
    Raises FormatError for a scheme that the format doesn't have, and for several group sizes.
    """
    named = {"": schemes} if isinstance(schemes, QuantScheme) else schemes
    sizes = {AWQFormat(scheme).scheme.weight.granularity.group_size or -1 for scheme in named.values()}
    if len(sizes) != 1:
        raise FormatError(f"awq has one group size for all layers, not {len(sizes)} ({sorted(sizes)}); gptq has more")
    heads = [module for module in named if module.endswith("lm_head")]
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop(),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [m for m in ignore if not m.endswith("lm_head") and not m.startswith("re:")] or None,
        **({"lm_head": True} if heads else {}),
    }
