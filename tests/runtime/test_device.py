"""What the machine, or the container, leaves to this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.runtime.parallel.placement import cpus_in_cgroup
from octavo.runtime.worker.device import free_memory, left_in_cgroup


@pytest.mark.parametrize(
    ("cpu_max", "expected"), [("max 100000", 1 << 16), ("250000 100000", 2), ("50000 100000", 1), (None, 1 << 16)]
)
def test_a_quota_of_cpu_time_is_whole_cpus(tmp_path: Path, cpu_max: str | None, expected: int) -> None:
    if cpu_max is not None:
        (tmp_path / "cpu.max").write_text(cpu_max + "\n")
    assert cpus_in_cgroup(tmp_path) == expected


def test_a_memory_limit_counts_without_the_page_cache(tmp_path: Path) -> None:
    assert left_in_cgroup(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert left_in_cgroup(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_cgroup(tmp_path) == 1 << 62


def test_some_memory_is_free() -> None:
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50
