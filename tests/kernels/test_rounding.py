"""The CPU bodies of the rounding kernels against their reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.gptq import cpu, reference
from octavo.kernels.gptq.grid import Grid

GRIDS = [Grid(-8, 7), Grid(-128, 127), Grid(-2, 1), Grid(-448, 448, fp8=True), Grid(-6, 6, fp4=True)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weights(k: int, n: int) -> Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(k + n))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("k", "n", "group_size"), [(160, 70, 64), (33, 5, 32), (64, 64, 64)])
def test_best_candidate(grid: Grid, asymmetric: bool, k: int, n: int, group_size: int) -> None:
    """The same candidate, or one whose error is as small: the sums of 64 squares are added up in another order."""
    values, importance, groups = weights(k, n), torch.rand(k) + 0.1, -(-k // group_size)
    scales = (torch.rand(7, groups, n) + 0.5) * 3 / grid.most
    zeros = torch.randint(grid.least // 4, grid.most // 4 + 1, scales.shape).float() if asymmetric else None
    got = cpu.best_candidate(values, importance, group_size, scales, zeros, grid)
    truth = reference.best_candidate(values, importance, group_size, scales, zeros, grid)
    for g in range(groups):
        rows = slice(g * group_size, (g + 1) * group_size)

        def error(best: Tensor, g: int = g, rows: slice = rows) -> Tensor:
            pick = best[g].long()[None]
            scale, zero = scales[:, g].gather(0, pick), None if zeros is None else zeros[:, g].gather(0, pick)
            rounded = reference.from_grid(reference.to_grid(values[rows], scale, zero, grid), scale, zero)
            return importance[rows].double() @ (rounded.double() - values[rows].double()).square()

        assert (error(got) <= error(truth) * (1 + 64 * 2.0**-23)).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(128, 70), (17, 3), (64, 256)])
def test_round_columns(grid: Grid, asymmetric: bool, rows: int, n: int) -> None:
    """Step by step from the body's own values: a code that two orders of adding round apart changes what follows."""
    values = weights(rows, n)
    factor = torch.linalg.cholesky(torch.cov(torch.randn(rows, 3 * rows))).t().contiguous()
    scales = (torch.rand(rows, n) + 0.5) * 3 / grid.most
    zeros = torch.randint(grid.least // 4, grid.most // 4 + 1, scales.shape).float() if asymmetric else None
    got, truth = values.clone(), values.clone()
    errors, wanted = torch.zeros_like(values), torch.zeros_like(values)
    for i in range(rows):
        truth.copy_(got)
        cpu.round_columns(got, factor, (i, i + 1), scales, zeros, grid, errors)
        reference.round_columns(truth, factor, (i, i + 1), scales, zeros, grid, wanted)
        assert torch.equal(got[i], truth[i])
        # One product and one sum a step, which the reference may fuse: a unit of the larger of the two.
        size = truth.abs().amax() + (factor[i].abs().amax() * errors[i].abs().amax())
        assert (got - truth).abs().amax() <= 2.0**-23 * size
        assert (errors[i] - wanted[i]).abs().amax() <= 2.0**-22 * wanted[i].abs().amax().clamp(min=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(33, 70), (64, 3)])
def test_descend_columns(grid: Grid, asymmetric: bool, rows: int, n: int) -> None:
    """With moments that are diagonal no row hears of another; with others, the gradients add up alike."""
    scales = (torch.rand(rows, n) + 0.5) * 3 / grid.most
    zeros = torch.randint(grid.least // 4, grid.most // 4 + 1, scales.shape).float() if asymmetric else None
    start = reference.to_grid(weights(rows, n), scales, zeros, grid)
    mixed = torch.cov(torch.randn(rows, 3 * rows))
    for moments in (torch.diag(mixed.diagonal()), mixed):
        results = []
        for body in (cpu, reference):
            codes, gradient, steps = start.clone(), weights(n, rows).t().contiguous(), torch.zeros_like(start)
            body.descend_columns(codes, gradient, moments.contiguous(), scales, zeros, grid, steps)
            results.append((codes, gradient, steps))
        (codes, gradient, steps), (wanted, truth, moves) = results
        # A product and a sum a step, which the reference may fuse: a tie may fall otherwise, and what follows with it.
        same = (codes == wanted).all(0)
        assert same.float().mean() > 0.9
        assert (gradient - truth)[:, same].abs().max() <= rows * 2.0**-23 * (
            1 + moments.abs().max() * moves.abs().max()
        )
        assert (steps - moves)[:, same].abs().max() <= 2.0**-23 * moves.abs().max()


def test_spans_and_threads_do_not_show() -> None:
    values, factor = weights(128, 1000), torch.linalg.cholesky(torch.cov(torch.randn(128, 400))).t().contiguous()
    scales, grid = torch.full_like(values, 0.4), Grid(-8, 7)
    results = []
    for threads, spans in ((1, [(0, 128)]), (2, [(0, 128)]), (2, [(0, 32), (32, 100), (100, 128)])):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            codes, errors = values.clone(), torch.zeros_like(values)
            for span in spans:
                cpu.round_columns(codes, factor, span, scales, None, grid, errors)
        finally:
            torch.set_num_threads(before)
        results.append((codes, errors))
    for codes, errors in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(errors, results[0][1])
