"""What a quantizer must know of a decoder block's wiring: which linear layers share an input, and who makes it.

Plain values between the runtime, which knows architectures, and calibration, which doesn't know the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
