"""Proofs compiled without a GPU: nothing spills, all fits into shared memory, products reach tensor cores.

By default so many proofs are compiled for sm_90 that each kernel has each narrow storage once; `pytest -m slow`
compiles every proof for sm_80, sm_89 and sm_90. `golden/triton-VERSION.json` lists the tensor-core instructions of each
proof on sm_90.
`python tests/kernels/compile/ahead.py tests/kernels/compile/golden/triton-VERSION.json` writes it anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ahead
import pytest
from compiling import environment

pytestmark = pytest.mark.long

GOLDEN = Path(__file__).parent / "golden"
Facts = dict[str, dict[str, Any]]


def compile_all(directory: Path, *flags: str) -> Facts:
    """What `ahead` writes, from processes that don't interpret."""
    out = directory / "facts.json"
    own = environment(TRITON_CACHE_DIR=str(directory / "cache"))
    subprocess.run([sys.executable, ahead.__file__, str(out), *flags], check=True, env=own)
    found: Facts = json.loads(out.read_text())
    return found


def objections(facts: Facts) -> dict[str, list[str]]:
    """What is wrong, by proof."""
    return {name: one["objections"] for name, one in facts.items() if one["objections"]}


def compare_with_golden(facts: Facts) -> None:
    """The installed Triton's tensor-core instructions are those that its table lists."""
    table = GOLDEN / f"triton-{version('triton')}.json"
    if not table.exists():
        pytest.skip(f"no table of Triton {version('triton')}; tests/kernels/compile/ahead.py writes one")
    known = json.loads(table.read_text())
    assert facts == {name: known[name] for name in facts}


def test_each_storage_of_a_kernel_compiles_as_it_must(tmp_path: Path) -> None:
    facts = compile_all(tmp_path, "--sample")
    assert list(facts) == ahead.sample(ahead.proofs())
    assert objections(facts) == {}
    compare_with_golden(facts)


@pytest.mark.slow
def test_every_launch_compiles_as_it_must(tmp_path: Path) -> None:
    facts = compile_all(tmp_path)
    assert list(facts) == list(ahead.proofs())
    assert objections(facts) == {}
    compare_with_golden(facts)


def test_the_gpu_machine_s_triton_has_a_table() -> None:
    known = json.loads((GOLDEN / "triton-3.6.0.json").read_text())
    assert list(known) == list(ahead.proofs())
    assert objections(known) == {}


# On an A100 e4m3 is rounded and read without instructions for it; the others multiply it.
CORES = {80: {"HMMA", "IMMA"}, 89: {"HMMA", "IMMA", "QMMA"}}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89])
def test_all_kernels_compile_for_other_cards(capability: int, tmp_path: Path) -> None:
    """For an A100 (80), or an L40S and a 4090 (89): nothing spills, all fits, products reach tensor cores."""
    facts = compile_all(tmp_path, "--capability", str(capability))
    assert objections(facts) == {}
    assert {op.split(".")[0] for one in facts.values() for op in one["tensor cores"]} == CORES[capability]
