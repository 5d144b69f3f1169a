"""The CPU bodies of the small operators against their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.norm import cpu, reference

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def close(got: Tensor, truth: Tensor, dtype: torch.dtype, slack: float) -> bool:
    """Both round once to dtype (a unit each), and differ before that by `slack` float32 units of the truth.

    The absolute part is the smallest normal float16, below which its spacing is fixed.
    """
    limit = truth.float().abs() * (2 * UNIT[dtype] + slack * 2.0**-24) + 2.0**-14 * UNIT[dtype]
    return bool(((got.float() - truth.float()).abs() <= limit).all())


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("columns", [17, 64, 576])
def test_norms(dtype: torch.dtype, rows: int, columns: int) -> None:
    """The mean of squares is a sum of positive numbers: relative error at most columns units, halved by the root."""
    torch.manual_seed(0)
    x, residual, weight = (
        torch.randn(rows, columns).to(dtype),
        torch.randn(rows, columns).to(dtype),
        torch.randn(columns),
    )
    assert close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype, columns)
    got, truth = cpu.add_rms_norm(x, residual, weight, 1e-5), reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(got[1], truth[1])
    assert close(got[0], truth[0], dtype, columns)
    for after, multiplier, last in ((weight, 1.0, None), (None, 0.22, weight), (None, 1.0, None)):
        first = x if after is None else cpu.rms_norm(x, after, 1e-5)  # compared above
        got = cpu.add_rms_norm(x, residual, last, 1e-5, after, multiplier)
        truth = reference.add_rms_norm(first, residual, last, 1e-5, None, multiplier)
        assert torch.equal(got[1], truth[1])
        assert close(got[0], truth[0], dtype, columns)


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_gated(dtype: torch.dtype, rows: int) -> None:
    """exp is good to 4 units; the tanh form 1 + tanh(u) of the reference cancels for u < 0, which is absolute error."""
    torch.manual_seed(0)
    x = (torch.randn(rows, 2 * 100) * 4).to(dtype)
    assert close(cpu.silu_and_mul(x), reference.silu_and_mul(x), dtype, 16)
    got, truth = cpu.gelu_tanh_and_mul(x).float(), reference.gelu_tanh_and_mul(x).float()
    product = (x[:, :100].float() * x[:, 100:].float()).abs()
    assert ((got - truth).abs() <= truth.abs() * (2 * UNIT[dtype] + 2.0**-20) + product * 2.0**-23 + 2.0**-24).all()


def test_extremes_stay_finite() -> None:
    x = torch.tensor([[-1e4, 1e4, -88.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(cpu.silu_and_mul(x), reference.silu_and_mul(x)) or close(
        cpu.silu_and_mul(x), reference.silu_and_mul(x), torch.float32, 64
    )
