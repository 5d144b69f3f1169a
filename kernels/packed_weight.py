"""What every packed weight answers, whatever its layout: its tensors, its bytes, and the numbers it stands for."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class PackedWeight(ABC):
    """A weight [N, K], or the weights [E, N, K] of E experts, in the layout that one kernel reads."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds on its device, a bias that the kernel adds included."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """The weight in float32, in the order of columns in which it was packed: the oracle of tests."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those that aren't None."""
    return tuple(tensor for tensor in tensors if tensor is not None)
