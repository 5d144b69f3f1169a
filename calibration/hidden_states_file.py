"""The calibration samples' hidden states between two blocks: a file, so that memory doesn't know their number.

What fits into memory stays there, in the system's cache; `--offload-dir` puts the files on another disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BATCH_TOKENS = 2048  # tokens that go through a block at a time
BATCH_SAMPLES = 64  # at most, each of which has a block of the KV cache or a state


@dataclass(frozen=True)
class Shape:
    """num_samples sequences of seq_len tokens."""

    num_samples: int
    seq_len: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.num_samples * self.seq_len * self.hidden_size * self.dtype.itemsize

    @property
    def batch(self) -> int:
        """Samples that go through a block at a time."""
        return min(BATCH_SAMPLES, max(1, BATCH_TOKENS // self.seq_len))


class Hidden:
    """One file [num_samples, seq_len, hidden_size], written once from front to back, read any number of times."""

    def __init__(self, path: Path, shape: Shape, *, again: bool = False) -> None:
        self.path = path
        self.shape = shape
        self._file = path.open("rb" if again else "wb+", buffering=0)
        self._hash = hashlib.sha256()

    def append(self, batch: Tensor) -> None:
        """batch [B, seq_len, hidden_size]: the next samples."""
        data = batch.to("cpu", self.shape.dtype).contiguous().view(torch.uint8).numpy().data.cast("B")
        self._hash.update(data)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from None

    def batches(self, num_samples: int | None = None) -> Iterator[Tensor]:
        """The first samples, or all, [B, seq_len, hidden_size] at a time."""
        end = self.shape.num_samples if num_samples is None else min(num_samples, self.shape.num_samples)
        for begin in range(0, end, self.shape.batch):
            yield self._read(begin, min(self.shape.batch, end - begin))

    def samples(self, indices: Sequence[int]) -> Tensor:
        """Some samples, [len(indices), seq_len, hidden_size]."""
        return torch.cat([self._read(index, 1) for index in indices])

    def _read(self, begin: int, count: int) -> Tensor:
        shape = self.shape
        out = torch.empty(count, shape.seq_len, shape.hidden_size, dtype=shape.dtype)
        raw = out.view(torch.uint8).numpy().data.cast("B")
        offset = begin * shape.nbytes // shape.num_samples
        if os.preadv(self._file.fileno(), [raw], offset) != len(raw):
            raise OSError(f"{self.path.name} is shorter than it was written")
        return out

    def sync(self) -> str:
        """Have it on the disk; the hash of all that was appended."""
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def is_whole(self, sha256: str) -> bool:
        """Check the file's content against the hash of what was written."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest() == sha256

    def close(self, *, remove: bool) -> None:
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)
