"""A processor without AVX-512: what is compiled for it must compile, and answer as this machine's kernels do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import answered
import pytest

pytestmark = pytest.mark.slow  # compiles most CPU kernels again, for a quarter of a minute


def by_a_haswell(model: Path, cache: Path) -> list[dict[str, float]]:
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, answered.__file__, str(model)]
    result = subprocess.run(command, env=os.environ | haswell, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    answer: list[dict[str, float]] = json.loads(result.stdout)
    return answer


def test_the_engine_runs_on_a_processor_without_avx512(fixtures: Path, tmp_path: Path) -> None:
    model = fixtures / "tiny--llmc-w8a8"
    old = by_a_haswell(model, tmp_path)
    new = answered.log_probabilities(str(model))
    assert len(old) == len(new) == 37
    both = [(a[t], b[t]) for a, b in zip(old, new, strict=True) for t in a.keys() & b.keys()]
    assert len(both) > 4 * 37
    # the old one rounds weights and inputs to bf16: hundredths of a nat in two layers; a wrong kernel makes whole ones
    assert sum(abs(a - b) for a, b in both) / len(both) < 0.05
