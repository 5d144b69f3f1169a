"""Freed memory is kept for the next step, and given back when it is asked for; counted in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.freed_memory import give_back_freed_memory, keep_freed_memory
from octavo.runtime.worker.cache_memory import resident_bytes

MEGABYTE = 1 << 20


def fill_pieces() -> int:
    """Ten times three pieces as a step has them; returns the page faults of all times but the first."""
    faults = 0
    for time in range(10):
        if time == 1:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(size * MEGABYTE, dtype=torch.uint8) for size in (30, 30, 8, 1)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def check() -> None:
    torch.set_num_threads(1)
    assert fill_pieces() > 10_000
    keep_freed_memory()
    assert fill_pieces() < 100
    before = resident_bytes()
    give_back_freed_memory()
    assert before - resident_bytes() > 30 * MEGABYTE


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_pieces_come_back_without_page_faults_until_they_are_given_back() -> None:
    program = f"import {Path(__file__).stem} as checks; checks.check()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
