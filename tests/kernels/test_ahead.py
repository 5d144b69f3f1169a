"""Every proof of every room, compiled for sm_90 without a GPU: spills, shared memory, tensor-core instructions.

What a version of Triton made of them stands in `sass/triton-VERSION.json`, so that a change of one of them is seen.
`python -m octavo.kernels.ahead tests/kernels/sass/triton-VERSION.json` writes it anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from octavo.kernels import ahead

TABLES = Path(__file__).parent / "sass"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All proofs, compiled in processes that don't interpret."""
    out = tmp_path_factory.mktemp("sass") / "facts.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(out.parent / "cache")
    subprocess.run([sys.executable, "-m", "octavo.kernels.ahead", str(out)], check=True, env=environment)
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", ahead.proofs())
def test_a_launch_compiles_as_it_must(compiled: dict[str, dict[str, Any]], name: str) -> None:
    assert compiled[name]["objections"] == []


def test_what_this_triton_makes_of_them_is_what_it_made(compiled: dict[str, dict[str, Any]]) -> None:
    table = TABLES / f"triton-{version('triton')}.json"
    if not table.exists():
        pytest.skip(f"no table of Triton {version('triton')}; `python -m octavo.kernels.ahead` writes one")
    assert compiled == json.loads(table.read_text())


def test_the_gpu_machine_s_triton_has_a_table() -> None:
    known = json.loads((TABLES / "triton-3.6.0.json").read_text())
    assert list(known) == list(ahead.proofs())
    assert {name: facts["objections"] for name, facts in known.items() if facts["objections"]} == {}
