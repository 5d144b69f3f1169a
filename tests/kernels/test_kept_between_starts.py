"""What Triton has compiled it finds again in the next process: nothing that its cache goes by differs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import compile_some


def found_in_cache(directory: Path, hash_seed: str) -> dict[str, bool]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(directory), "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, compile_some.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    first, second = (found_in_cache(tmp_path, seed) for seed in ("1", "2"))
    assert len(first) == len(compile_some.ROOMS)
    assert not any(first.values())
    assert second == dict.fromkeys(first, True)
