"""Compiled kernels are found again by what all of their sources say, and by nothing older."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from octavo.kernels.native.compile_cache import sources_hash

ROOM = Path(__file__).parents[2] / "kernels"
PROGRAM = "from octavo.kernels.norm.cpu import _rms_norm; _rms_norm.compile()"


def test_the_hash_is_of_every_source(tmp_path: Path) -> None:
    (tmp_path / "int8").mkdir()
    first, second = tmp_path / "tile.py", tmp_path / "int8" / "cpu.py"
    first.write_text("a = 1\n")
    second.write_text("b = 2\n")
    seen = {sources_hash(tmp_path)}
    second.write_text("b = 3\n")
    seen.add(sources_hash(tmp_path))
    second.rename(tmp_path / "cpu.py")
    seen.add(sources_hash(tmp_path))
    assert len(seen) == 3


def test_kernels_are_cached_under_that_hash(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOM.parent / "src")}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    (room,) = (tmp_path / "octavo").iterdir()
    assert room.name == f"kernels-{sources_hash(ROOM)}"
    assert list(room.rglob("*.nbc"))
