"""Linear layers of a GGUF file: ggml's blocks of integers, as `quant.gguf.blocks` has them.

A linear layer [N, K]: blocks [N, bytes] uint8, the blocks of each row one after another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError, QuantFormat
from octavo.quant.formats.reading import check_nothing_left, sides, take
from octavo.quant.gguf.blocks import BLOCK_TYPES, BlockType
from octavo.quant.gguf.encode import ENCODERS
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import QuantScheme

BLOCKS = "blocks"
SUFFIXES = (BLOCKS,)


@dataclass(frozen=True)
class GGUFFormat:
    """kind: of the blocks, 'Q4_K', which must be one of integers."""

    kind: str

    @property
    def scheme(self) -> QuantScheme:
        scheme = self._type.scheme
        assert scheme is not None
        return QuantScheme(scheme)

    @property
    def _type(self) -> BlockType:
        return BLOCK_TYPES[self.kind]

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {BLOCKS: TensorSpec(torch.uint8, (out_features, self._bytes(in_features)))}

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's blocks hold."""
        n, nbytes = sides(tensors, BLOCKS)
        return n, nbytes // self._type.nbytes * self._type.columns

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Blocks of these very numbers. Raises FormatError for a kind that isn't written, and for others' numbers."""
        if self.kind not in ENCODERS:
            raise FormatError(f"blocks of {self.kind} are not written; {', '.join(ENCODERS)} are")
        if weight.g_idx is not None:
            raise FormatError("blocks have their columns in order, and it has act-order")
        n, k = weight.shape
        spec = self.tensors(n, k)[BLOCKS]
        scheme = self.scheme.weight
        low, high = scheme.int_range
        if int(weight.codes.min()) < low or int(weight.codes.max()) > high:
            raise FormatError(f"its integers are not from {low} to {high}, as those of {self.kind} are")
        groups = (-1, self._type.columns // scheme.granularity.tile(n, k)[1])
        minima = torch.empty(0) if weight.zero_point is None else weight.zero_point.float().reshape(groups)
        encode = ENCODERS[self.kind]
        blocks = encode(weight.codes.reshape(-1, self._type.columns), weight.scale.float().reshape(groups), minima)
        return {BLOCKS: blocks.reshape(spec.shape)}

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Codes, scales and minima in float32, from these very bytes."""
        left = dict(tensors)
        raw = take(left, BLOCKS)
        n, k = self.shape(tensors)
        assert self._type.integers is not None
        codes, scale, minima = self._type.integers(raw.reshape(-1, self._type.nbytes))
        check_nothing_left(left, f"with blocks of {self.kind}")
        groups = (n, -1)
        return QuantizedWeight(
            self.scheme, codes.reshape(n, k), scale.reshape(groups), None if minima is None else minima.reshape(groups)
        )

    def _bytes(self, in_features: int) -> int:
        if in_features % self._type.columns:
            raise FormatError(f"{in_features} columns are no whole blocks of {self.kind}, {self._type.columns} each")
        return in_features // self._type.columns * self._type.nbytes


def kind_of(scheme: QuantScheme) -> str:
    """The kind of blocks that hold a scheme's integers. Raises FormatError for one that none holds."""
    for kind in ENCODERS:
        if BLOCK_TYPES[kind].scheme == scheme.weight and scheme.activation is None:
            return kind
    raise FormatError(f"no GGUF block holds {scheme}; {', '.join(ENCODERS)} are written")


@dataclass(frozen=True)
class GGUFConfig:
    """kinds: of the blocks of each linear layer that has integers."""

    kinds: Mapping[str, str]
    name: str = "gguf"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> QuantFormat | None:  # noqa: ARG002
        kind = self.kinds.get(module)
        return None if kind is None else GGUFFormat(kind)


def parse_gguf(raw: Mapping[str, Any]) -> GGUFConfig:
    """What `Checkpoint.open` says of a GGUF file's blocks; no config.json has it."""
    return GGUFConfig(raw["layers"])
