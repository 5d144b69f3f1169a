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

from octavo.calibration.team import ALONE, Team, share_of, wait_for_all

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
    """One file [num_samples, seq_len, hidden_size], written once and read often, in which a team has shares."""

    def __init__(self, path: Path, shape: Shape, team: Team = ALONE, *, again: bool = False) -> None:
        """again: it is there, from an earlier run; else the first member makes it, and the others wait for that."""
        self.path = path
        self.shape = shape
        self._team = team
        if again:
            self._file = path.open("rb", buffering=0)
            return
        if team.rank == 0:
            self._file = path.open("wb+", buffering=0)
        wait_for_all(team)
        if team.rank > 0:
            self._file = path.open("rb+", buffering=0)

    def put(self, begin: int, batch: Tensor) -> None:
        """batch [B, seq_len, hidden_size]: the samples from `begin` on."""
        data = batch.to("cpu", self.shape.dtype).contiguous().view(torch.uint8).numpy().data.cast("B")
        offset = begin * self._sample_nbytes
        try:
            while data:
                count = os.pwrite(self._file.fileno(), data, offset)
                data = data[count:]
                offset += count
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from None

    def batches(self, num_samples: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """This member's share of the first samples, or of all: the first one's number, [B, seq_len, hidden_size]."""
        end = self.shape.num_samples if num_samples is None else min(num_samples, self.shape.num_samples)
        begins = range(0, end, self.shape.batch)
        for begin in (begins[i] for i in share_of(self._team, len(begins))):
            yield begin, self._read(begin, min(self.shape.batch, end - begin))

    def samples(self, indices: Sequence[int]) -> Tensor:
        """Some samples, [len(indices), seq_len, hidden_size]."""
        return torch.cat([self._read(index, 1) for index in indices])

    def _read(self, begin: int, count: int) -> Tensor:
        shape = self.shape
        out = torch.empty(count, shape.seq_len, shape.hidden_size, dtype=shape.dtype)
        raw = out.view(torch.uint8).numpy().data.cast("B")
        if os.preadv(self._file.fileno(), [raw], begin * self._sample_nbytes) != len(raw):
            raise OSError(f"{self.path.name} is shorter than it was written")
        return out

    def sync(self) -> str:
        """Have it on the disk, once all members have written; the hash of what is there."""
        os.fsync(self._file.fileno())
        return self._digest()

    def is_whole(self, sha256: str) -> bool:
        """Check the file's content against the hash of what was written."""
        return self._digest() == sha256

    def _digest(self) -> str:
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def close(self, *, remove: bool) -> None:
        """remove: it isn't needed any more; the first member removes it for all."""
        self._file.close()
        if remove and self._team.rank == 0:
            self.path.unlink(missing_ok=True)

    @property
    def _sample_nbytes(self) -> int:
        return self.shape.nbytes // self.shape.num_samples
