"""Safetensors files (https://github.com/huggingface/safetensors#format), read lazily and written tensor by tensor.

The safetensors package loads and saves whole files. Here we need to read a header without its data, to free a tensor's
memory with the tensor (a mapping's pages count as resident until the file is closed), and to write a file without
holding it in memory. The layout is 8 bytes of header size, a JSON header, then the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from octavo.quant.model_files import ANEW, parse_json
from octavo.quant.printable import printable, shown

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit
MAX_TENSORS = 400_000  # of a checkpoint, which take some 10 s; the largest mixtures of experts have 210,000
MAX_SIZE = 1 << 48  # of a dimension or an offset
MAX_DIMENSIONS = 8
MAX_NAME = 10_000  # characters; a config's regexes are matched against names


class SafetensorsError(ValueError):
    """A file that is not a complete, well-formed safetensors file; the message names it."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's type and shape: enough to plan files and memory before the tensor exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class SafetensorsFile:
    """One file: its header is read at once, its tensors on demand. metadata: the header's own, texts by name."""

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises SafetensorsError for a truncated or malformed file."""
        self.path = path
        self.size = path.stat().st_size
        self.specs: dict[str, TensorSpec] = {}
        self._begin: dict[str, int] = {}
        self._map: Tensor | None = None
        header, data_start = self._read_header()
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        if len(header) > MAX_TENSORS:
            raise SafetensorsError(
                f"{path.name}: its header has {len(header):,} tensors; {MAX_TENSORS:,} are the most that a checkpoint "
                "may have"
            )
        for name, entry in header.items():
            spec, begin = self._parse_entry(name, entry)
            self.specs[name] = spec
            self._begin[name] = data_start + begin
        self._check_layout(data_start)

    def view(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file: nothing is copied, and pages are read when they are touched."""
        if self._map is None:
            self._map = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        spec = self.specs[name]
        begin = self._begin[name]
        raw = self._map[begin : begin + spec.nbytes]
        if begin % spec.dtype.itemsize:
            raw = raw.clone()  # some writers don't align; a typed view must be aligned
        return raw.view(spec.dtype).view(spec.shape)

    def unmap(self) -> None:
        """Forget the mapping, so that its pages no longer count as the process's memory once the last view is gone."""
        self._map = None

    def read(self, name: str) -> Tensor:
        """The tensor in its own memory, which is freed with it."""
        spec = self.specs[name]
        raw = torch.empty(spec.nbytes, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            self._fill(file.fileno(), raw, self._begin[name])
        return raw.view(spec.dtype).view(spec.shape)

    def chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[Tensor]:
        """The tensor's bytes [n] uint8 in pieces, each valid until the next, for copying without holding the tensor."""
        begin = self._begin[name]
        left = self.specs[name].nbytes
        buffer = torch.empty(min(chunk_bytes, left), dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            while left > 0:
                part = buffer[:left]
                self._fill(file.fileno(), part, begin)
                yield part
                begin = begin + part.numel()
                left = left - part.numel()

    def divide(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """Replace a tensor by several, by name and shape, that lie one after another in its bytes."""
        spec = self.specs.pop(name)
        begin = self._begin.pop(name)
        for part, shape in parts.items():
            self.specs[part] = TensorSpec(spec.dtype, shape)
            self._begin[part] = begin
            begin += self.specs[part].nbytes

    def _fill(self, fd: int, out: Tensor, offset: int) -> None:
        target = out.numpy().data
        while target:
            count = os.preadv(fd, [target], offset)
            if count == 0:
                raise SafetensorsError(f"{self.path.name} ended at byte {offset} while it was read")
            target = target[count:]
            offset = offset + count

    def _read_header(self) -> tuple[dict[str, Any], int]:
        with self.path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(self.size - 8, MAX_HEADER_BYTES):
                raise SafetensorsError(
                    f"{self.path.name} is truncated or not a safetensors file: {self.size} bytes, "
                    f"of which the header claims {length}; {ANEW}"
                )
            try:
                header = parse_json(file.read(length), unique_keys=True)
            except ValueError as e:
                raise SafetensorsError(f"{self.path.name}: its header is not JSON ({e}); {ANEW}") from e
        if not isinstance(header, dict):
            raise SafetensorsError(f"{self.path.name}: its header is not a JSON object")
        return header, 8 + length

    def _check_layout(self, end: int) -> None:
        """Check that each byte after the header belongs to exactly one tensor: no gap, no overlap, no rest."""
        for name in sorted(self.specs, key=lambda name: (self._begin[name], self.specs[name].nbytes)):
            if self._begin[name] != end:
                what = "a gap before" if self._begin[name] > end else "another tensor's bytes in"
                raise SafetensorsError(f"{self.path.name}: its header has {what} {_short(name)}; {ANEW}")
            end += self.specs[name].nbytes
        if end < self.size:
            raise SafetensorsError(
                f"{self.path.name} has {self.size - end} bytes more than its header tells of; {ANEW}"
            )
        if end > self.size:
            raise SafetensorsError(
                f"{self.path.name} is truncated: its header promises {end} bytes, it has {self.size}; {ANEW}"
            )

    def _parse_entry(self, name: str, entry: Any) -> tuple[TensorSpec, int]:
        try:
            dtype = entry["dtype"]
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            name.encode()  # half a surrogate pair can't be printed, nor written to another file
        except (TypeError, KeyError, ValueError) as e:
            raise SafetensorsError(f"{self.path.name}: malformed header entry for {_short(name)}") from e
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise SafetensorsError(
                f"{self.path.name}: {_short(name)} has dtype {_short(str(dtype))}; known are {', '.join(DTYPES)}"
            )
        if not all(type(n) is int and 0 <= n <= MAX_SIZE for n in (*shape, begin, end)) or len(shape) > MAX_DIMENSIONS:
            raise SafetensorsError(
                f"{self.path.name}: malformed header entry for {_short(name)}: shape {shown(list(shape))}, "
                f"data_offsets {shown([begin, end])}"
            )
        if len(name) > MAX_NAME:
            raise SafetensorsError(
                f"{self.path.name}: the name of {_short(name)} has {len(name):,} characters; {MAX_NAME:,} are the most"
            )
        spec = TensorSpec(DTYPES[dtype], shape)
        if end - begin != spec.nbytes:
            raise SafetensorsError(
                f"{self.path.name}: {_short(name)} is {dtype} {list(shape)}, {spec.nbytes} bytes, but {end - begin} "
                "are stored"
            )
        return spec, begin


def _short(name: str) -> str:
    """Text out of a header, in a message; it may be megabytes long."""
    return printable(name, 200)


class PlacedWriter:
    """Writes a file whose tensors are known in advance and arrive one by one, in any order; a context manager.

    The header is written first and each tensor at its own place, so nothing is held in memory. With `again` the file
    exists already and holds some of its tensors; `is_there` says which.
    places  of each tensor in the file
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], header: bytes, places: Mapping[str, int], *, again: bool
    ) -> None:
        self.path = path
        self.specs = dict(specs)
        self._places = places
        self._missing = {name for name, spec in self.specs.items() if spec.nbytes}
        self.nbytes = max([len(header), *(places[name] + spec.nbytes for name, spec in self.specs.items())])
        self._fd = os.open(path, os.O_RDWR if again else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._pwrite(memoryview(header), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one whole tensor, which must have the announced type and shape."""
        spec = self.specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(f"{name}: announced as {spec}, got {tensor.dtype} {tuple(tensor.shape)}")
        if spec.nbytes:
            self.write_bytes(name, iter([tensor.contiguous().flatten().view(torch.uint8)]))

    def write_bytes(self, name: str, chunks: Iterator[Tensor]) -> None:
        """Store one whole tensor from pieces of its bytes [n] uint8."""
        offset = self._places[name]
        end = offset + self.specs[name].nbytes
        for chunk in chunks:
            self._pwrite(chunk.numpy().data, offset)
            offset += chunk.numel()
        if offset != end:
            raise ValueError(f"{name}: {end - offset} bytes short of what was announced")
        self._missing.discard(name)

    def copy(self, name: str, chunks: Iterator[Tensor]) -> None:
        """Store one whole tensor from pieces of the source's bytes [n] uint8."""
        self.write_bytes(name, chunks)

    def is_there(self, name: str) -> None:
        """Mark a tensor that an earlier writer of this file has written."""
        self._missing.discard(name)

    def stored(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """A tensor's bytes as stored in the file; fewer if the file ends."""
        begin = self._places[name]
        left = self.specs[name].nbytes
        while left > 0 and (chunk := os.pread(self._fd, min(chunk_bytes, left), begin)):
            yield chunk
            begin = begin + len(chunk)
            left = left - len(chunk)

    def sync(self) -> None:
        """Force what was written so far onto the disk."""
        os.fsync(self._fd)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                count = os.pwrite(self._fd, data, offset)
            except OSError as e:
                raise OSError(e.errno, e.strerror, str(self.path)) from None
            data = data[count:]
            offset = offset + count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        """Close the file. Without an exception, every tensor must have been written, and is forced onto the disk."""
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{self.path.name}: never written: {', '.join(sorted(self._missing))}")
                os.fsync(self._fd)
        finally:
            os.close(self._fd)


class SafetensorsWriter(PlacedWriter):
    """Tensors are ordered by falling item size, then by name, as the safetensors package has it: each is aligned."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], *, again: bool = False) -> None:
        specs = dict(sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets = {}
        offset = 0
        for name, spec in specs.items():
            offsets[name] = offset
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        begin = 8 + len(encoded)
        places = {name: begin + offset for name, offset in offsets.items()}
        super().__init__(path, specs, len(encoded).to_bytes(8, "little") + encoded, places, again=again)
