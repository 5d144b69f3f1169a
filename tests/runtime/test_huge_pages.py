"""Weights are copied into huge pages and stay the same bytes.

How many there are is counted in a process of their own: whatever a test before has left gives some back at any time.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.kernels.native.huge_memory import HUGE_PAGE, huge_tensor, in_huge_pages

MEGABYTE = 1 << 20


def huge_bytes() -> int:
    """Of this process's memory, how much is in huge pages, as Linux says."""
    match = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert match is not None
    return 1024 * int(match.group(1))


def pack_weights() -> None:
    """Fifty of 0.7 MB and one of 20 MB and some; the small ones' last piece is partly filled."""
    weights = [torch.arange(90_000).view(-1, 16).T for _ in range(50)]
    weights.append(torch.arange(20 * MEGABYTE // 8 + 3))
    before = huge_bytes()
    packed = [in_huge_pages(weight) for weight in weights]
    assert huge_bytes() - before >= sum(weight.nbytes for weight in weights) - 2 * HUGE_PAGE
    assert all(map(torch.equal, packed, weights))
    assert all(weight.is_contiguous() and weight.data_ptr() % 64 == 0 for weight in packed)
    kept = packed[20]
    del packed
    assert torch.equal(kept, weights[20])
    del kept
    assert huge_bytes() - before <= 2 * HUGE_PAGE  # what the next small one would lie in


def ask_for_memory() -> None:
    before = huge_bytes()
    small = huge_tensor(MEGABYTE)
    small.fill_(1)
    assert huge_bytes() == before
    memory = huge_tensor(9 * MEGABYTE + 5)
    assert (memory.shape, memory.data_ptr() % HUGE_PAGE) == ((9 * MEGABYTE + 5,), 0)
    memory.fill_(1)
    assert huge_bytes() - before == 8 * MEGABYTE
    part = memory[-1:]
    del memory
    assert part.item() == 1
    del part
    assert huge_bytes() == before


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this kernel has no transparent huge pages"
)
@pytest.mark.parametrize("check", [pack_weights, ask_for_memory])
def test_huge_pages_are_had_as_far_as_they_are_filled(check: Callable[[], None]) -> None:
    """Of layers, many are smaller than a huge page, and share it with their neighbors."""
    program = f"import {Path(__file__).stem} as checks; checks.{check.__name__}()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nothing_needs_no_memory() -> None:
    assert in_huge_pages(torch.empty(0, 3)).shape == (0, 3)
