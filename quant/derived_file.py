"""Tensors that are computed from a file's own when they are asked for: quantized layers decoded, fused experts divided.

Whoever derives them says how; here is only their place among the others of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.tensor_file import TensorFile


@dataclass(frozen=True)
class Derived:
    """A tensor that is not stored. make: computes it, in memory of its own, as spec says."""

    spec: TensorSpec
    make: Callable[[], Tensor]


class DerivedFile:
    """A file with some tensors in place of others, a `TensorFile` as it is one itself.

    hidden  names of the file's tensors that are not seen any more; their places are the derived ones'
    """

    def __init__(self, file: TensorFile, derived: Mapping[str, Derived], hidden: Collection[str]) -> None:
        self.path = file.path
        self.size = file.size
        self.specs = {name: spec for name, spec in file.specs.items() if name not in hidden}
        self.specs |= {name: tensor.spec for name, tensor in derived.items()}
        self._file = file
        self._derived = derived

    def view(self, name: str) -> Tensor:
        """The tensor, in memory of its own if it is derived."""
        derived = self._derived.get(name)
        return self._file.view(name) if derived is None else derived.make()

    def read(self, name: str) -> Tensor:
        """The tensor in its own memory, which is freed with it."""
        derived = self._derived.get(name)
        return self._file.read(name) if derived is None else derived.make()

    def chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[Tensor]:
        """The tensor's bytes in pieces; a derived one is held whole meanwhile."""
        if name not in self._derived:
            yield from self._file.chunks(name, chunk_bytes)
        else:
            yield from torch.split(self.view(name).flatten().view(torch.uint8), chunk_bytes)

    def unmap(self) -> None:
        self._file.unmap()

    def divide(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """Replace one of the file's own tensors by several that lie one after another in its bytes."""
        self._file.divide(name, parts)
        spec = self.specs.pop(name)
        self.specs |= {part: TensorSpec(spec.dtype, shape) for part, shape in parts.items()}
