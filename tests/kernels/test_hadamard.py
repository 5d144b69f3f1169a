"""Hadamard transforms of rows: the reference against whole matrices, the CPU's body against that in float64."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from octavo.kernels.hadamard import cpu
from octavo.kernels.hadamard.reference import hadamard, largest_block
from octavo.kernels.native import cpu_features

SIZES = [(64, 64), (96, 32), (1536, 512), (4864, 256), (2048, 2048), (7, 1), (10, 2), (24, 8), (12, 4)]
PASSES = [(48, 16), (384, 128), (3072, 1024), (8192, 8192)]  # of which each has another number of vectors


@pytest.mark.parametrize(("columns", "block"), SIZES)
def test_it_is_scipys_matrix_in_blocks(columns: int, block: int) -> None:
    x = torch.randn(3, columns, dtype=torch.float64)
    matrix = torch.from_numpy(scipy.linalg.hadamard(block)).double() * block**-0.5
    whole = torch.block_diag(*[matrix] * (columns // block))
    torch.testing.assert_close(hadamard(x, block), x @ whole)
    assert largest_block(columns) % block == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "block"), SIZES + PASSES)
@pytest.mark.parametrize("is_wide", [True, False])
def test_the_body_is_the_reference(
    columns: int, block: int, dtype: torch.dtype, is_wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of log2(block) levels and the factor round once in float32, and the end once in the row's type."""
    monkeypatch.setattr(cpu_features, "has_wide_registers", lambda: is_wide)
    torch.manual_seed(0)
    x = (torch.randn(37, columns) * torch.logspace(-2, 2, 37)[:, None]).to(dtype)
    expected = hadamard(x.double(), block)
    found = cpu.hadamard_(x.clone(), block)
    size = x.double().abs().amax(1, keepdim=True) * block**0.5
    limit = size * (block.bit_length() + 1) * 2.0**-24 + expected.abs() * torch.finfo(dtype).eps / 2
    limit = limit + torch.finfo(dtype).smallest_normal
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= limit).all()


def test_it_is_its_own_inverse_in_its_place() -> None:
    x = torch.randn(5, 512)
    rows = x.clone()
    assert cpu.hadamard_(rows, 256) is rows
    torch.testing.assert_close(cpu.hadamard_(rows, 256), x)


@pytest.mark.parametrize("block", [3, 128, 0])
def test_blocks_that_are_none(block: int) -> None:
    for body in (cpu.hadamard_, hadamard):
        with pytest.raises(ValueError, match=f"Hadamard blocks of {block}"):
            body(torch.zeros(2, 64), block)


@pytest.mark.parametrize("block", [8, 512])
def test_odd_numbers_stay_in_their_blocks(block: int) -> None:
    x = torch.zeros(3, 1024)
    x[0, 1] = torch.inf
    x[1, 600] = torch.nan
    expected = hadamard(x, block)
    found = cpu.hadamard_(x.clone(), block)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert not found[0, block:].any()
