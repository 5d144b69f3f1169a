"""GPTQ, as AutoGPTQ, GPTQModel, AutoRound and optimum write it, and vLLM, SGLang and transformers read it.

Source: AutoGPTQ, `nn_modules/qlinear/qlinear_cuda_old.py`; ModelCloud/GPTQModel, `nn_modules/qlinear/__init__.py` and
`utils/model.py`. A linear layer [N, K] of b-bit weights with G groups of columns:

qweight [K b / 32, N] int32, packed down each column: the dense bit stream of quant/packing.py
qzeros  [G, N b / 32] int32, packed along N
scales  [G, N] float16; AutoGPTQ stores float32 after a float32 load, others bfloat16
g_idx   [K] int32, the group of each column. Columns stay in their order; with desc_act only g_idx is unsorted.

Fields are unsigned: the signed integer plus 2^(b - 1). Version 1, and files without a `checkpoint_format`, store each
zero point minus 1; version 2 stores it as it is. Nothing in the tensors tells which but that a symmetric layer's zero
points are all 2^(b - 1): labels that contradict this are known to be wrong, and the tensors are believed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.quant.formats.compressed_tensors import scheme_targets
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.reading import check_nothing_left, check_shape, exactly, sides, take_scales, take_words
from octavo.quant.packing import pack, packed_columns, unpack, unpack_planar
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import QuantScheme
from octavo.version import VERSION

Version = Literal[1, 2]
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
IN_BLOCK = re.compile(r"(?:^|\.)layers\.\d+\.(.+)$")
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a 1 in each field of a word


@dataclass(frozen=True)
class GPTQFormat:
    """Converts one layer's tensors, keyed by suffix, to and from the canonical weight.

    desc_act      the config says that groups are not in the order of the columns: g_idx is needed
    scale_dtype   for writing; what is read keeps the type that it was stored in
    whole_words   version 1's zero points were made by subtracting whole words, as GPTQModel does, where a zero point
                  of 0 borrows from its neighbour: adding whole words gives back what was there
    read_bits     of a stored field, in a layout that is read and not written: 5 to 7 bits, and 3 in planes; None: the
                  scheme's bits, read and written
    planar        these fields lie in planes of bits, GPTQModel's; else in the dense stream, AutoRound's
    """

    scheme: QuantScheme
    version: Version = 1
    desc_act: bool = False
    scale_dtype: torch.dtype = torch.float16
    whole_words: bool = False
    read_bits: int | None = None
    planar: bool = False

    def __post_init__(self) -> None:
        w = self.scheme.weight
        if (
            w.dtype not in (*(() if self.read_bits is None else ("int5", "int6")), "int8", "int4", "int3", "int2")
            or self.scheme.activation is not None
        ):
            raise FormatError(
                f"gptq holds integer weights and doesn't quantize activations; it can't hold {self.scheme}"
            )
        if w.granularity.kind not in ("channel", "group"):
            raise FormatError(f"gptq has scales per channel or group, not per {w.granularity}")

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """What `write` will return for a weight of this shape. Raises FormatError where its sides don't fill words."""
        n = out_features
        k = in_features
        bits = self.scheme.weight.bits
        per_row = 32 if bits == 3 else 32 // bits
        for name, size in (("in_features", k), ("out_features", n)):
            if size % per_row:
                raise FormatError(f"{name} {size} is not a multiple of {per_row}, as gptq's {bits}-bit words need")
        groups = self.scheme.weight.granularity.scale_shape(n, k)[1]
        return {
            "qweight": TensorSpec(torch.int32, (packed_columns(k, bits), n)),
            "qzeros": TensorSpec(torch.int32, (groups, packed_columns(n, bits))),
            "scales": TensorSpec(self.scale_dtype, (groups, n)),
            "g_idx": TensorSpec(torch.int32, (k,)),
        }

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        words, n = sides(tensors, "qweight")
        return n, words * 32 // self._bits

    @property
    def _bits(self) -> int:
        """Of a stored field."""
        return self.read_bits or self.scheme.weight.bits

    def _unpack(self, words: Tensor, columns: int) -> Tensor:
        if not self.planar:
            return unpack(words, self._bits, columns, padded=False)
        try:
            return unpack_planar(words, self._bits)
        except ValueError as e:
            raise FormatError(str(e)) from None

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `tensors` announces. Raises FormatError for a weight that the format can't hold."""
        n, k = weight.shape
        if self.read_bits is not None:
            layout = "planes" if self.planar else "fields"
            raise FormatError(f"gptq's {layout} of {self.read_bits} bits are read, not written")
        self.tensors(n, k)
        if weight.scheme != self.scheme:
            raise FormatError(f"a weight of {weight.scheme} can't be written as {self.scheme}")
        bits = self.scheme.weight.bits
        in_order = self._in_order(k)
        g_idx = in_order if weight.g_idx is None else weight.g_idx.int()
        if not self.desc_act and not torch.equal(g_idx, in_order):
            raise FormatError("its groups are not in the order of its columns: desc_act must be true")
        return {
            "qweight": pack(weight.codes, bits).t().contiguous(),
            "qzeros": pack(self._stored_zeros(weight), bits),
            "scales": exactly(weight.scale, self.scale_dtype).t().contiguous(),
            "g_idx": g_idx,
        }

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight. Raises FormatError if a tensor is missing, unexpected, or not as the scheme says."""
        left = dict(tensors)
        bits = self._bits
        words = take_words(left, "qweight")
        k = words.shape[0] * 32 // bits
        n = words.shape[1]
        if packed_columns(k, bits) != words.shape[0]:
            raise FormatError(f"qweight has {words.shape[0]} rows of words, which {bits}-bit weights don't fill")
        groups = self.scheme.weight.granularity.scale_shape(n, k)[1]
        why = f"of qweight {list(words.shape)} and {self.scheme}"
        scale = take_scales(left, "scales")
        check_shape("scales", scale, (groups, n), why)
        qzeros = take_words(left, "qzeros")
        check_shape("qzeros", qzeros, (groups, packed_columns(n, bits)), why)
        zero_point, note = self._read_zeros(qzeros, n)
        g_idx = self._read_g_idx(left, k, groups)
        check_nothing_left(left, "beside qweight")
        codes = self._unpack(words.t(), k)
        return QuantizedWeight(self.scheme, codes, scale.t().contiguous(), zero_point, g_idx, note=note)

    def _in_order(self, k: int) -> Tensor:
        return torch.arange(k, dtype=torch.int32) // (self.scheme.weight.granularity.group_size or k)

    def _stored_zeros(self, weight: QuantizedWeight) -> Tensor:
        """The zero points [G, N] int8, signed, as this version stores them."""
        zeros = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
        if self.version == 1:
            if bool((zeros == self.scheme.weight.int_range[0]).any()):
                raise FormatError(
                    "a zero point is 0, which version 1 of gptq would store as -1, and readers disagree what that is; "
                    "gptq_v2 holds it"
                )
            zeros = zeros - 1
        return zeros.t().contiguous()

    def _read_zeros(self, words: Tensor, n: int) -> tuple[Tensor | None, str]:
        """The zero points [N, G] int8, None if symmetric, and a note for the user."""
        bits = self._bits
        if not self.scheme.weight.symmetric:
            if self.version == 1 and self.whole_words and bits in ONES:
                zeros = unpack(words + ONES[bits], bits, n, padded=False)
            else:
                zeros = self._wrap(self._unpack(words, n) + (1 if self.version == 1 else 0))
            return zeros.t().contiguous(), ""
        stored = self._unpack(words, n)
        low, high = (int(x) for x in stored.aminmax())
        if low == high == (-1 if self.version == 1 else 0):
            return None, ""
        if low == high and low in (-1, 0):
            is_, not_ = ("gptq_v2", "gptq") if self.version == 1 else ("gptq", "gptq_v2")
            return None, (
                f"the config says {not_}, but the zero points (all {low + (1 << bits - 1)}, of a symmetric scheme) are "
                f"{is_}'s: read as such"
            )
        middle = 1 << bits - 1
        raise FormatError(
            f"qzeros holds {low + middle}..{high + middle} as stored although sym is true, which makes all of them "
            f"{middle} (or {middle - 1} in version 1); with sym false the stored ones are used"
        )

    def _wrap(self, zeros: Tensor) -> Tensor:
        """A stored all-ones field stands for a zero point of 0: its 2^b comes back as 0."""
        half = 1 << self._bits - 1
        return torch.where(zeros == half, -half, zeros) if self._bits < 8 else zeros  # int8 wraps by itself

    def _read_g_idx(self, left: dict[str, Tensor], k: int, groups: int) -> Tensor | None:
        """The group of each column [K] int32, None if the columns are in the order of their groups."""
        g_idx = left.pop("g_idx", None)
        if g_idx is not None:
            check_shape("g_idx", g_idx, (k,), "one per row that qweight holds")
        if g_idx is None or (groups > 1 and not bool(g_idx.any())):  # some writers left it at zeros
            if self.desc_act and groups > 1:
                raise FormatError(
                    "g_idx is missing or all 0 although desc_act is true: the columns' groups are unknown"
                )
            return None
        if g_idx.is_floating_point() or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise FormatError(f"g_idx is {g_idx.dtype} and points outside the {groups} groups")
        return None if torch.equal(g_idx.int(), self._in_order(k)) else g_idx.int().clone()


def write_gptq_config(
    schemes: QuantScheme | Mapping[str, QuantScheme],
    ignore: list[str],
    *,
    version: Version = 1,
    desc_act: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of config.json. Source of the keys: GPTQModel, `quantization/config.py`.

    ignore: names, or regexes ('re:...').
    schemes: one for all linear layers but those in `ignore`, or each layer's by its full name. The most frequent is the
    config's own and the others go into GPTQModel's `dynamic`, which vLLM and SGLang know and transformers doesn't.
    lm_head stays as it is unless `schemes` names it. Raises FormatError for a scheme that the format doesn't have.
    """
    named = {} if isinstance(schemes, QuantScheme) else dict(schemes)
    base = schemes if isinstance(schemes, QuantScheme) else Counter(named.values()).most_common(1)[0][0]
    for scheme in {base, *named.values()}:
        GPTQFormat(scheme, version, desc_act)
    dynamic: dict[str, dict[str, Any]] = {
        f"-:^{m[3:] if m.startswith('re:') else re.escape(m)}$": {} for m in ignore if not m.endswith("lm_head")
    }
    for scheme, targets in scheme_targets(named).items():
        if scheme != base:
            for target in targets:
                regex = target[3:] if target.startswith("re:") else f"{re.escape(target)}$"
                dynamic[f"+:^{regex}"] = _bits_and_groups(scheme)
    name = "gptq" if version == 1 else "gptq_v2"
    kinds = _kinds(named)
    # transformers knows no `dynamic`: it takes every layer of a block to be quantized that this doesn't leave out.
    listed = {"modules_in_block_to_quantize": [sorted(kinds)]} if _kinds(ignore) and not kinds & _kinds(ignore) else {}
    return {
        **_bits_and_groups(base),
        "desc_act": desc_act,
        "lm_head": any(module.endswith("lm_head") for module in named),
        "method": "gptq",
        "quant_method": "gptq",
        "format": name,
        "checkpoint_format": name,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        **(listed if kinds else {}),
        "meta": {"quantizer": [f"octavo:{VERSION}"]},
    }


def _kinds(modules: Iterable[str]) -> set[str]:
    """Names of layers in their block: 'mlp.down_proj'."""
    return {match[1] for match in map(IN_BLOCK.search, modules) if match}


def _bits_and_groups(scheme: QuantScheme) -> dict[str, Any]:
    w = scheme.weight
    return {"bits": w.bits, "group_size": w.granularity.group_size or -1, "sym": w.symmetric}
