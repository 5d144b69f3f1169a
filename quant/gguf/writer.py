"""Writes a GGUF file: its header, and its tensors each at its place, as they come under Hugging Face's names.

Source: ggml-org/ggml, `docs/gguf.md`. Version 3, little-endian, tensors aligned to 32 bytes.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.quant.gguf.architectures import Change
from octavo.quant.gguf.blocks import BLOCK_TYPES, TYPE_NAMES
from octavo.quant.gguf.header import ARRAY, MAGIC, STRING
from octavo.quant.safetensors_file import PlacedWriter, TensorSpec

ALIGNMENT = 32
VERSION = 3
BOOL = 7
NUMBERS = {int: (4, "<I"), float: (6, "<f")}  # of metadata: the type's number, and its form
INT32 = 5


@dataclass(frozen=True)
class Piece:
    """One of Hugging Face's tensors in the file.

    name    of the tensor that it is, or one expert's part of
    kind    of the numbers there
    source  what comes to be written
    expert  its place among the experts; None: it is a tensor of its own
    change  of its rows or numbers
    rounds  to a kind's blocks from numbers; None: they come as they are to be, or as numbers of another type
    """

    name: str
    kind: str
    source: TensorSpec
    columns: int
    expert: int | None = None
    change: Change | None = None
    rounds: Change | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape without columns."""
        return self.source.shape[:-1]

    @property
    def spec(self) -> TensorSpec:
        """What is stored of it."""
        block = BLOCK_TYPES[self.kind]
        if block.plain is not None:
            return TensorSpec(block.plain, (*self.rows, self.columns))
        return TensorSpec(torch.uint8, (*self.rows, self.columns // block.columns * block.nbytes))

    def stored(self, tensor: Tensor) -> Tensor:
        """The numbers or blocks as they lie in the file."""
        if self.rounds is not None:
            tensor = self.rounds(tensor)
        if self.spec.dtype == torch.float32:
            tensor = tensor.float()
        if self.change is not None:
            tensor = self.change(tensor)
        return tensor.to(self.spec.dtype).reshape(self.spec.shape).contiguous()


@dataclass(frozen=True)
class GGUFLayout:
    """All that is known of a file before its numbers: metadata, further tensors, and pieces by Hugging Face's names."""

    metadata: Mapping[str, Any]
    pieces: Mapping[str, Piece]
    factors: Mapping[str, list[float]]  # of rotations

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: piece.spec for name, piece in self.pieces.items()}

    @cached_property
    def _offsets(self) -> dict[str, int]:
        """Of the tensors behind the header, by their own names."""
        offsets: dict[str, int] = {}
        at = 0
        for name, (_, _, nbytes) in self._tensors.items():
            offsets[name] = at
            at += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return offsets

    @cached_property
    def _tensors(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Kind, shape and bytes of each tensor."""
        found: dict[str, tuple[str, tuple[int, ...], int]] = {
            name: ("F32", (len(values),), 4 * len(values)) for name, values in self.factors.items()
        }
        counts = Counter(piece.name for piece in self.pieces.values())
        for piece in self.pieces.values():
            count = counts[piece.name]
            shape = (*piece.rows, piece.columns) if piece.expert is None else (count, *piece.rows, piece.columns)
            found[piece.name] = (piece.kind, shape, count * piece.spec.nbytes)
        return found

    @cached_property
    def _head(self) -> bytes:
        """All before the tensors."""
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(self._tensors), len(self.metadata))]
        for key, value in self.metadata.items():
            parts += [_string(key), _value(value)]
        for name, (kind, shape, _) in self._tensors.items():
            number = next(n for n, known in TYPE_NAMES.items() if known == kind)
            parts += [_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
            parts.append(struct.pack("<IQ", number, self._offsets[name]))
        return _aligned(b"".join(parts))

    @property
    def header(self) -> bytes:
        """With the rotations' factors, which stand first behind it."""
        factors = (struct.pack(f"<{len(values)}f", *values) for values in self.factors.values())
        return self._head + b"".join(map(_aligned, factors))

    @property
    def places(self) -> dict[str, int]:
        """Where each piece begins in the file."""
        begins = {name: len(self._head) + self._offsets[piece.name] for name, piece in self.pieces.items()}
        return {name: begins[name] + (piece.expert or 0) * piece.spec.nbytes for name, piece in self.pieces.items()}


def _aligned(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % ALIGNMENT)


class GGUFWriter(PlacedWriter):
    """A file of a layout. Tensors come as Hugging Face has them, linear layers in blocks."""

    def __init__(self, path: Path, layout: GGUFLayout, *, again: bool = False) -> None:
        self._pieces = layout.pieces
        super().__init__(path, layout.specs, layout.header, layout.places, again=again)

    def write(self, name: str, tensor: Tensor) -> None:
        super().write(name, self._pieces[name].stored(tensor))

    def copy(self, name: str, chunks: Iterator[Tensor]) -> None:
        """Store a tensor from pieces of the source's bytes."""
        source = self._pieces[name].source
        whole = torch.cat([chunk.clone() for chunk in chunks])
        self.write(name, whole.view(source.dtype).view(source.shape))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value of the metadata with its type; of lists all have the first one's."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
        kind, form = (INT32, "i") if isinstance(value[0], int) else (6, "f")
        return struct.pack(f"<IIQ{len(value)}{form}", ARRAY, kind, len(value), *value)
    kind, form = NUMBERS[type(value)]
    return struct.pack("<I", kind) + struct.pack(form, value)
