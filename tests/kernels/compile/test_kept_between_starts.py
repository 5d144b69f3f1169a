"""The next process finds what Triton compiled in its cache: nothing that the cache's key is made of differs."""

from __future__ import annotations

from pathlib import Path

import compile_some
from compiling import printed


def found_in_cache(directory: Path, hash_seed: str) -> dict[str, bool]:
    found: dict[str, bool] = printed(
        compile_some.__file__, TRITON_CACHE_DIR=str(directory), PYTHONHASHSEED=hash_seed
    )  # fmt: skip
    return found


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    first, second = (found_in_cache(tmp_path, seed) for seed in ("1", "2"))
    assert len(first) == len(compile_some.MAKERS)
    assert not any(first.values())
    assert second == dict.fromkeys(first, True)
