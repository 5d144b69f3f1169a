"""A kernel bound to its packed weight: what a linear layer is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.kernels.quantized_activation import Rounding


@dataclass(frozen=True)
class Body:
    """`run` maps x [M, K], or what it wants to have rounded, to [M, N].

    wants     the rounding of the input that `run` takes as well, for the kernel before to do; None: plain tensors only
    partial   as run, but it may return [S, M, N] float32, which the next kernel adds up; None: there is no such form
    has_bias  the kernel adds the bias
    """

    name: str
    run: Callable[[Any], Tensor]
    weight_bytes: int
    wants: Rounding | None = None
    partial: Callable[[Any], Tensor] | None = None
    has_bias: bool = False


def tensors_of(packed: Any) -> Iterator[Tensor]:
    """All that a packed weight holds."""
    return (value for value in vars(packed).values() if isinstance(value, Tensor))
