"""The header of a GGUF file: its metadata, and the place, type and shape of each tensor.

Source: ggml-org/ggml, `docs/gguf.md`. Versions 2 and 3, little-endian. A file may come from anybody, so every count and
length is checked against the file's size before it is believed.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from octavo.quant.gguf.blocks import BLOCK_TYPES, TYPE_NAMES
from octavo.quant.model_files import ANEW, CheckpointError
from octavo.quant.printable import printable, shown
from octavo.quant.safetensors_file import MAX_TENSORS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 10_000
MAX_DIMENSIONS = 4
MAX_VALUES = 1 << 22  # in all arrays of the metadata; 300,000 tokens have a million
MAX_TEXT = 1 << 22  # bytes of a string, such as a chat template
MAX_ITEM = 1 << 16  # bytes of a string in an array, such as a token
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING = 8
ARRAY = 9
FREQS = "rope_freqs.weight"
LONG = "rope_factors_long.weight"
SHORT = "rope_factors_short.weight"
MAX_FACTORS = 1 << 12


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file. shape: rows first, as torch has it, the reverse of the file's order."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """metadata: by key, as Python values; tensors: by their names in the file; nbytes: of the header itself.

    factors: what divides the frequencies of rotations, by the tensors' names, which `tensors` are without
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    nbytes: int
    factors: dict[str, list[float]] = field(default_factory=dict)


class _TruncatedError(Exception):
    pass


def read_header(path: Path) -> GGUFHeader:
    """Raises CheckpointError, which names the file, for one that is damaged or of a kind that isn't read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (_TruncatedError, struct.error):
        raise CheckpointError(f"{path} is truncated or damaged: its GGUF header leads past its end; {ANEW}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged: a string of its GGUF header is not UTF-8; {ANEW}") from None
    except (ValueError, OverflowError) as e:  # of an empty file, too, which can't be mapped
        raise CheckpointError(f"{path}: {e}") from None


class _Reader:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0
        self.num_values = 0

    def header(self) -> GGUFHeader:
        if self.take(4) != MAGIC:
            raise ValueError("it is not a GGUF file")
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(
                f"GGUF version {version} is not read; {' and '.join(map(str, VERSIONS))} are, little-endian"
            )
        num_tensors = self.number("<Q")
        num_keys = self.number("<Q")
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise ValueError(f"it claims {num_tensors:,} tensors and {num_keys:,} keys, which no model has")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"the key {printable(key, 100)} is there twice")
            metadata[key] = self.value(self.number("<I"))
        entries = [self.entry() for _ in range(num_tensors)]
        header_bytes = self.at
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"general.alignment is {shown(alignment)}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, kind, shape, offset in entries:
            if name in tensors:
                raise ValueError(f"the tensor {printable(name, 100)} is there twice")
            if offset % alignment:
                raise ValueError(
                    f"{printable(name, 100)} begins at byte {offset} of the tensors, no multiple of {alignment}"
                )
            tensors[name] = self.placed(name, kind, shape, start + offset)
        for (one, first), (other, second) in pairwise(sorted(tensors.items(), key=lambda item: item[1].begin)):
            if first.begin + first.nbytes > second.begin:
                raise ValueError(f"{printable(one, 100)} and {printable(other, 100)} overlap")
        factors = {name: self.factors(name, tensors.pop(name)) for name in (FREQS, LONG, SHORT) if name in tensors}
        return GGUFHeader(metadata, tensors, header_bytes, factors)

    def factors(self, name: str, tensor: StoredTensor) -> list[float]:
        if tensor.kind != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MAX_FACTORS:
            raise ValueError(f"{name} is {tensor.kind} {list(tensor.shape)}; a row of F32 is needed")
        self.at = tensor.begin
        values = list(struct.unpack(f"<{tensor.shape[0]}f", self.take(tensor.nbytes)))
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"{name} has a factor that is no finite number above 0")
        return values

    def placed(self, name: str, kind: str, shape: tuple[int, ...], begin: int) -> StoredTensor:
        block = BLOCK_TYPES[kind]
        if shape[-1] % block.columns:
            raise ValueError(
                f"{printable(name, 100)} is {kind} {list(shape)}, whose rows are no whole blocks of {block.columns}"
            )
        nbytes = math.prod(shape) // block.columns * block.nbytes
        if begin + nbytes > self.size:
            raise _TruncatedError
        return StoredTensor(kind, shape, begin, nbytes)

    def entry(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self.string()
        count = self.number("<I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise ValueError(f"{printable(name, 100)} has {count} dimensions")
        shape = tuple(self.number("<Q") for _ in range(count))[::-1]
        number = self.number("<I")
        kind = TYPE_NAMES.get(number, f"type {number}")
        if kind not in BLOCK_TYPES:
            known = ", ".join(BLOCK_TYPES)
            raise ValueError(f"{printable(name, 100)} is {kind}, which is not read; {known} are")
        if min(shape) < 1:
            raise ValueError(f"{printable(name, 100)} has the shape {list(shape)}")
        return name, kind, shape, self.number("<Q")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(self.form(kind))
        kind = self.number("<I")
        count = self.number("<Q")
        self.num_values += count
        if self.num_values > MAX_VALUES:
            raise ValueError(f"the arrays of its metadata have {self.num_values:,} values; {MAX_VALUES:,} are the most")
        if kind == STRING:
            return [self.string(MAX_ITEM) for _ in range(count)]
        if kind == ARRAY:
            raise ValueError("it has an array of arrays, which no model needs")
        form = self.form(kind)
        return list(struct.unpack(f"<{count}{form[1]}", self.take(count * struct.calcsize(form))))

    def form(self, kind: int) -> str:
        if kind not in SCALARS:
            raise ValueError(f"its metadata has a value of type {kind}, which is unknown")
        return SCALARS[kind]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self, most: int = MAX_TEXT) -> str:
        length = self.number("<Q")
        if most < length <= self.size - self.at:
            raise ValueError(f"a string of its header has {length:,} bytes; {most:,} are the most here")
        return self.take(length).decode()

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _TruncatedError
        self.at += count
        return self.data[self.at - count : self.at]
