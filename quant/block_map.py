"""What a quantizer must know of a decoder block's wiring: which linear layers share an input, and who makes it;
and of a whole decoder, who reads and writes its residual stream.

Plain values between the runtime, which knows architectures, and calibration, which doesn't know the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from octavo.quant.scheme import KVScheme


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block that read one input: q, k and v, or gate and up of every expert.

    name     'qkv', 'o', 'gate_up', 'down', 'experts.gate_up', 'experts.3.down'
    modules  their full names in the checkpoint, in the order of their outputs
    """

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """An input whose channels can be divided by any s > 0 in the op that makes them, at no cost.

    group     name of the InputGroup that reads the input and is multiplied by s
    producer  full name of the module that makes it: a norm, or a linear layer
    kind      'norm': its weight is divided, w + offset = (w_old + offset) / s. 'rows': rows [rows] of a linear layer's
              weight and bias are divided
    offset    of a norm (Gemma applies 1 + w)
    rows      which rows of the producer, all when None: the v part of a fused qkv_proj, the up part of gate_up_proj
    repeats   a producer's row feeds this many input channels (query heads of one KV head): their s must be equal
    head_dim  rows per head, for `repeats`: channels (head, query, dim) stand in this order
    also      modules outside the group that read the input, and are multiplied with it: a router, which isn't quantized
    """

    group: str
    producer: str
    kind: Literal["norm", "rows"]
    offset: float = 0.0
    rows: tuple[int, int] | None = None
    repeats: int = 1
    head_dim: int = 1
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredCache:
    """How a block's keys and values are stored: a scheme, and a checkpoint's scales for it, [1] or [heads, 1, 1]."""

    scheme: KVScheme
    scales: Mapping[str, Tensor]


@dataclass(frozen=True)
class ValueHeads:
    """One attention's values and who reads them: both may be rotated head by head.

    rows      of `producer` that make values, all when None
    consumer  the linear layer whose columns are heads of `head_dim`
    """

    producer: str
    consumer: str
    head_dim: int
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class RotationMap:
    """Who reads and writes the residual stream of a whole decoder, and each layer's heads of values.

    size       channels of the residual stream
    embedding  the module whose rows begin the stream
    head       what reads it last; tied: it has no weight of its own, but the embedding's
    readers    by the full name of a norm over the stream, the linear modules that read what it gives
    writers    linear modules whose output is added to the stream
    inner      linear modules whose input may be rotated while serving, and their columns
    offset     of the norms, as of `Fold`
    """

    size: int
    embedding: str
    head: str
    tied: bool
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    values: tuple[ValueHeads, ...]
    inner: Mapping[str, int]
    offset: float = 0.0
