"""Every proof of every room, compiled for sm_90 without a GPU: spills, shared memory, tensor-core instructions.
A sample of them, and of the sizes in other cards' tables, for sm_80 and sm_89.

What a version of Triton made of them stands in `sass/triton-VERSION.json`, so that a change of one of them is seen.
`python -m octavo.kernels.ahead tests/kernels/sass/triton-VERSION.json` writes it anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from compiling import environment

from octavo.kernels import ahead

TABLES = Path(__file__).parent / "sass"


def compile_all(directory: Path, *flags: str) -> dict[str, dict[str, Any]]:
    """What `ahead` writes, in processes that don't interpret."""
    out = directory / "facts.json"
    own = environment(TRITON_CACHE_DIR=str(directory / "cache"))
    subprocess.run([sys.executable, "-m", "octavo.kernels.ahead", str(out), *flags], check=True, env=own)
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All proofs for an H100."""
    return compile_all(tmp_path_factory.mktemp("sass"))


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


# The rest is compiled by `python -m octavo.kernels.ahead OUT.json --capability 80`, or 89. On an A100 e4m3 is
# rounded and read without instructions for it; the others multiply it.
SAMPLES = {
    80: r"(norm|silu|decode|prefill) fp8( 4096| 14336|, 32 / 8 heads of 128)$|rope and decode fp8.*listed, to fp8"
    r"|prefill bf16, 8 / 4|rows: (w8a16|int4), groups of (64|128) with .*128 x|rows: int8 128 x 128, 8"
    r"|rows: moe (bf16|int8) 128 x|rows: moe int4, groups of 32.*64 x|rows: (moe |)w8a16, e4m3.*128 x",
    89: r"norm fp8 4096|prefill fp8, 32 / 8 heads of 128$|rows: (fp8|moe fp8 blocks) 128 x|rows: int8 16 x"
    r"|rows: w8a16, groups of 128 .*128 x|rows: int4( fp8|), groups of 64 .*128 x"
    r"|rows: int4 fp8, groups of 32 .* 32 x",
}


@pytest.mark.parametrize("capability", [80, 89])
def test_kernels_compile_for_other_cards_in_their_tables_sizes(capability: int, tmp_path: Path) -> None:
    """For an A100, and for an L40S and a 4090: nothing spills, all fits, products reach tensor cores."""
    facts = compile_all(tmp_path, "--capability", str(capability), "--only", SAMPLES[capability])
    assert {name: of["objections"] for name, of in facts.items() if of["objections"]} == {}
    cores = {op.split(".")[0] for of in facts.values() for op in of["tensor cores"]}
    assert cores == ({"HMMA", "IMMA"} if capability == 80 else {"HMMA", "IMMA", "QMMA"})
