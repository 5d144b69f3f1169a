"""Weights move to huge pages and stay the same bytes.

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

from octavo.kernels.native.huge_memory import HUGE_PAGE, huge_tensor
from octavo.runtime.worker.huge_pages import use_huge_pages_soon

MEGABYTE = 1 << 20


def huge_bytes() -> int:
    """Of this process's memory, how much is in huge pages, as Linux says."""
    match = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert match is not None
    return 1024 * int(match.group(1))


def move_weights() -> None:
    weights = list(torch.arange(16 * MEGABYTE // 8).split(MEGABYTE // 8))  # 16 of 1 MB, side by side
    kept = [weight.clone() for weight in weights]
    before = huge_bytes()
    use_huge_pages_soon(weights).join()
    assert huge_bytes() - before >= 12 * MEGABYTE
    assert all(map(torch.equal, weights, kept))


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
@pytest.mark.parametrize("check", [move_weights, ask_for_memory])
def test_huge_pages_are_had_as_far_as_they_are_filled(check: Callable[[], None]) -> None:
    """Of layers, many are smaller than a huge page, and are moved together with their neighbors."""
    program = f"import {Path(__file__).stem} as checks; checks.{check.__name__}()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_lies_in_no_memory_of_its_own_is_passed_over() -> None:
    use_huge_pages_soon([torch.empty(0), torch.empty(1)]).join()
