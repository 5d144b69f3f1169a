"""A file of tensors as a checkpoint sees it, whatever its format: names, types and shapes, and numbers on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from octavo.quant.safetensors_file import TensorSpec


class TensorFile(Protocol):
    """`SafetensorsFile`, which says what each method does, or `GGUFFile`."""

    path: Path
    size: int
    specs: dict[str, TensorSpec]

    def view(self, name: str) -> Tensor: ...
    def read(self, name: str) -> Tensor: ...
    def chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[Tensor]: ...
    def unmap(self) -> None: ...
    def divide(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None: ...
