"""Kernels that start early wait before any other memory access: in the machine code and in the source.

The interpreter has neither waits nor prefetches; it can show which addresses are prefetched.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ahead import proofs
from compiling import printed
from proof import meta

from octavo.kernels.launching import launch
from octavo.kernels.launching.dependent_launch import PREFETCH_TILES, group_lines, row_lines, tile_lines
from octavo.kernels.launching.launch import Launch
from octavo.kernels.norm.gpu.embedding import embed

KERNELS = Path(__file__).parents[3] / "kernels"
ADDRESSES = {
    "logits_of",
    *("program_id", "arange", "minimum", "cdiv", "zeros", "to", "await_previous"),
    *("prefetch", "row_lines", "tile_lines", "group_lines", "tile_of", "tile_offsets"),
}
"""What a kernel may call before it waits: none of it reads or writes memory."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `overlapping` prints, from a process that doesn't interpret."""
    script, cache = Path(__file__).parent / "overlapping.py", tmp_path_factory.mktemp("overlap")
    found: dict[str, dict[str, Any]] = printed(script, TRITON_CACHE_DIR=str(cache))
    return found


def test_a_kernel_that_waits_first_overlaps(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["_copy"] == {"overlaps": True, "waits": True, "steps": 3, "said": []}  # prefetch, wait, let in


@pytest.mark.parametrize("kernel", ["_never", "_reads_before", "_writes_before", "_adds_before", "_ends_before"])
def test_who_does_not_wait_first_is_objected_to(compiled: dict[str, dict[str, Any]], kernel: str) -> None:
    assert "overlaps the kernel before and doesn't wait for it first" in compiled[kernel]["said"]


def test_who_lets_nobody_in_is_objected_to(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["_waits_only"]["said"] == ["overlaps and lets no kernel overlap it"]


@pytest.mark.parametrize("kernel", ["_plain", "on 89", "off"])
def test_what_does_not_overlap_has_nothing_of_it(compiled: dict[str, dict[str, Any]], kernel: str) -> None:
    assert compiled[kernel] == {"overlaps": False, "waits": False, "steps": 0, "said": []}


def overlapping_kernels() -> list[Any]:
    """Every Triton kernel of the product that may overlap the one before."""
    found: dict[int, Any] = {}
    for path in sorted(KERNELS.rglob("gpu/*.py")):
        parts = path.relative_to(KERNELS).with_suffix("").parts
        module = importlib.import_module(".".join(("octavo.kernels", *parts)))
        found |= {id(x): x for x in vars(module).values() if "OVERLAPS" in getattr(x, "arg_names", ())}
    return [kernel for kernel in found.values() if kernel.__name__.startswith("_")]


def test_there_are_overlapping_kernels() -> None:
    assert len(overlapping_kernels()) > 20


@pytest.fixture(scope="module")
def proven() -> set[int]:
    """The kernels that some proof compiles."""
    return {id(proof.launch.kernel) for proof in proofs().values()}


@pytest.mark.parametrize("kernel", overlapping_kernels(), ids=lambda kernel: str(kernel.__name__))
def test_whatever_overlaps_is_proven_and_waits_in_the_source(kernel: Any, proven: set[int]) -> None:
    assert id(kernel) in proven
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
    assert isinstance(function, ast.FunctionDef)
    at = [ast.unparse(statement) for statement in function.body].index("await_previous(OVERLAPS)")
    before = [node for statement in function.body[:at] for node in ast.walk(statement)]
    called = {ast.unparse(node.func).split(".")[-1] for node in before if isinstance(node, ast.Call)}
    assert called <= ADDRESSES, kernel.__name__
    assert not any(isinstance(node, ast.Return | ast.While | ast.For) for node in before), kernel.__name__


def embedding() -> Launch:
    table = meta(8, 64)
    return embed(meta(4, dtype=torch.int64), table, table[:4])


def test_overlapping_follows_the_card_and_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, overlaps in ((0, False), (80, False), (89, False), (90, True), (100, True)):
        arguments, options = embedding().on(capability)
        assert arguments["OVERLAPS"] is overlaps
        assert ("launch_pdl" in options) is overlaps
    monkeypatch.setattr(launch, "OVERLAPS_FROM", 91)
    arguments, options = embedding().on(90)
    assert not arguments["OVERLAPS"]
    assert "launch_pdl" not in options


@triton.jit
def _addresses(words, at, first_n, tiles, N, K, rows_out, tiles_out, groups_out, BLOCK_N: tl.constexpr):
    """What lies at each place that would be prefetched, of a tensor whose numbers are their own places."""
    n, t, zero = tl.arange(0, BLOCK_N), tl.arange(0, 4), tl.program_id(0)
    rows = tl.load(row_lines(words, at, zero + first_n, N, K, BLOCK_N))
    tl.store(rows_out + n[:, None] * 4 + t[None, :], rows)
    found = tl.load(tile_lines(words, at, tiles, zero + first_n, N, 32, BLOCK_N))
    line = tl.arange(0, BLOCK_N // 2)
    tl.store(tiles_out + t[:, None] * (BLOCK_N // 2) + line[None, :], found)
    scales = tl.load(group_lines(words, at, tiles, zero + first_n, N, 128, 256, BLOCK_N))
    tl.store(groups_out + t[:, None] * BLOCK_N + n[None, :], scales)


@pytest.mark.parametrize(("at", "first_n"), [(0, 0), (1, 16), (5, 32), (9, 32)])
def test_what_is_prefetched_exists_and_is_what_comes_first(at: int, first_n: int, device: torch.device) -> None:
    """Of 40 rows, 16 a program, and 7 tiles; the last program has 8 rows, and tiles past the end are the last."""
    n, k, tiles, width, block = 40, 600, 7, 32, 16
    words = torch.arange(n * max(k, tiles * width), device=device)
    room = [torch.full(shape, -1, device=device) for shape in ((block, 4), (4, block // 2), (4, block))]
    arguments = {"at": at, "first_n": first_n, "tiles": tiles, "N": n, "K": k, "BLOCK_N": block}
    Launch(_addresses, (1,), {"words": words, **arguments, **dict(zip(OUTPUTS, room, strict=True))})()
    rows, found, scales = (x.cpu() for x in room)
    assert PREFETCH_TILES.value == 4
    n_of = (first_n + torch.arange(block)).clamp(max=n - 1)
    tile = (at + torch.arange(4)).clamp(max=tiles - 1)
    assert torch.equal(rows, n_of[:, None] * k + (at + 128 * torch.arange(4)).clamp(max=k - 1))
    assert torch.equal(scales, (tile // 2 * n)[:, None] + n_of)
    # each line of 64 words that the program's rows of a tile have, once; past the last row the last word again
    ends = (tile * n + n)[:, None] * width - 1
    assert torch.equal(
        found, torch.minimum((tile * n + first_n)[:, None] * width + 64 * torch.arange(block // 2), ends)
    )


OUTPUTS = ("rows_out", "tiles_out", "groups_out")
