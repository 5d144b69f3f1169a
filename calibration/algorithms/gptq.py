"""GPTQ: round a weight column by column, each column's error made good by the columns that are still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Pure
functions of a weight and the second moments of its inputs; which weights and which text is not their business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.calibration.algorithms.group_scales import grid_of, rounding_body, search_scales
from octavo.calibration.algorithms.input_statistics import InputStats
from octavo.kernels.gptq import reference
from octavo.quant.qparams import (
    QuantizedWeight,
    WeightError,
    code_type,
    kept_type,
    of_global_scale,
    over_global_scale,
    quantize_weight,
    scale_type,
    storable,
)
from octavo.quant.scheme import QuantScheme, Search
from octavo.quant.super_blocks import has_own_grid

ActOrder = Literal["none", "static", "group"]

MOST_DAMPENING = 1.0  # of the mean of the moments' diagonal; past that the columns hardly know of each other
TRIANGLE = 256  # columns of a triangle that is inverted in one piece
LOSS_ROWS = 1024  # rows whose loss is computed at a time


@dataclass(frozen=True)
class GptqResult:
    """A weight that GPTQ rounded, and the dampening that it took (a fraction of the moments' mean diagonal)."""

    weight: QuantizedWeight
    dampening: float


def gptq_weight(
    weight: Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    act_order: ActOrder = "static",
    search: Search = "mse",
    dampening: float = 0.01,
    block_size: int = 128,
    sweeps: int = 2,
    scale_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,
) -> GptqResult:
    """Round a weight [N, K] onto a scheme so that its outputs on the calibration text change little.

    act_order: the order in which columns are rounded. none: as they stand. static: those with the largest inputs
        first, groups being those of the columns as they stand; their scales are chosen before anything is rounded.
        group: the same order, and groups are runs of columns in that order, told by g_idx (AutoGPTQ's desc_act).
        With the others a group's scales are chosen when its first column is due, from columns that have taken up the
        errors of those before.
    search: absmax or mse, the latter with each column's squared errors weighted by what they cost once the columns
        to come have made up for them, 1 / U[i, i]^2 (measured: a tenth less loss than with the moments' diagonal).
    dampening: what is added to the moments' diagonal, as a fraction of its mean; doubled while the moments are not
        positive definite, up to MOST_DAMPENING.
    sweeps: rounds of coordinate descent afterwards: each code in turn becomes the best with all others as they are
        (3 to 5% less loss on text that wasn't seen).
    scale_dtype: the type that will store the scales, the weight's own unless given. Codes are computed against them
        as stored.
    global_scale: what divides e4m3 scales; None: this weight's own.
    Columns that were never seen (moments of zero) are rounded to nearest. Besides the weight's own size in float32 and
    two of that, some 2 K^2 float32 are allocated. Raises WeightError for NaN, infinity, or wrong shapes.
    """
    _check(weight, stats)
    w = scheme.weight
    k = weight.shape[1]
    stored = scale_type(w, scale_dtype or weight.dtype)
    weight, whole = over_global_scale(weight, w, global_scale)
    run = _Run(weight, stats, scheme, act_order, stored, search)
    inverse, used = _inverse_factor(stats.moments, run.order, dampening)
    run.importance = inverse.diagonal().flip(0).square().reciprocal()
    if act_order == "static" or w.granularity.kind in ("tensor", "block") or has_own_grid(w):
        run.set_all_scales(weight)
    for begin, stop in _blocks(k, run.group_size, block_size):
        factor = inverse[k - stop : k - begin].flip(0, 1)  # U's rows begin..stop, and its columns from begin on
        factor = factor[:, begin:]
        errors = run.round_block(begin, stop, factor[:, : stop - begin].contiguous())
        if stop < k:
            run.values[stop:].addmm_(factor[:, stop - begin :].t(), errors, alpha=-1)
    del inverse
    if sweeps and bool(stats.moments.any()):
        run.descend(weight, stats.moments, used, sweeps, block_size)
    return GptqResult(of_global_scale(run.result(), whole), used)


def gptq_loss(weight: Tensor, dequantized: Tensor, stats: InputStats) -> float:
    """Squared error of the outputs over the calibration text, relative to their size.

    trace(D H D^T) / trace(W H W^T) for weights [N, K] with difference D and moments H; 0 when both are 0.
    """
    noise = signal = 0.0
    for before, after in zip(torch.split(weight, LOSS_ROWS), torch.split(dequantized, LOSS_ROWS), strict=True):
        noise += output_energy(after.float() - before.float(), stats.moments)
        signal += output_energy(before.float(), stats.moments)
    if signal == 0:
        return 0.0 if noise == 0 else float("inf")
    return noise / signal


def output_energy(change: Tensor, moments: Tensor) -> float:
    """trace(D H D^T): the mean over tokens of |D x|^2, for D [N, K] float32."""
    return float((change @ moments).mul_(change).sum(dtype=torch.float64))


def _check(weight: Tensor, stats: InputStats) -> None:
    k = weight.shape[1]
    if stats.moments.shape != (k, k):
        raise WeightError(f"it has {k} columns, but the statistics are of {stats.moments.shape[0]} inputs")
    if not bool(weight.isfinite().all()):
        raise WeightError("it holds NaN or infinity")
    if not bool(stats.moments.isfinite().all()):
        raise WeightError("the moments of its inputs hold NaN or infinity: the model's activations overflowed")


class _Run:
    """One weight on its way: values [K, N] float32 in the order of rounding, codes where a row is done."""

    def __init__(
        self,
        weight: Tensor,
        stats: InputStats,
        scheme: QuantScheme,
        act_order: ActOrder,
        dtype: torch.dtype,
        search: Search,
    ) -> None:
        n, k = weight.shape
        w = scheme.weight
        self.scheme = scheme
        self.dtype = dtype
        self.search = search
        self.group_size = w.granularity.tile(n, k)[1]
        energy = stats.moments.diagonal()
        self.order = None if act_order == "none" else energy.argsort(descending=True, stable=True)
        self.regrouped = act_order == "group" and w.granularity.kind == "group"
        self.values = weight.t().float().contiguous() if self.order is None else weight.t()[self.order].float()
        self.importance = torch.ones_like(energy)  # of the squared errors of each row
        column = torch.arange(k, device=weight.device)
        if self.order is not None and not self.regrouped:
            column = self.order
        self.groups = column // self.group_size  # the group of each row of values
        self.scales = torch.zeros(-(-k // self.group_size), n, device=weight.device)
        self.zeros = None if w.symmetric or w.minima else torch.zeros_like(self.scales)
        self.minima: Tensor | None = None  # [G, N], which values have been raised by
        self.stored: Tensor | None = None  # the scales of tensors and blocks, which rows share
        self.ready = False

    def set_all_scales(self, weight: Tensor) -> None:
        """Choose all scales from the weight as it came."""
        w = self.scheme.weight
        n, k = weight.shape
        if w.granularity.kind in ("tensor", "block"):
            scale = quantize_weight(weight.float(), self.scheme, self.search).scale
            self.stored = storable(scale, self.dtype)
            rows = w.granularity.tile(n, k)[0]
            self.scales.copy_(self.stored.repeat_interleave(rows, dim=0)[:n].t())
        elif has_own_grid(w):
            importance = self.importance if self.order is None else self.importance[self.order.argsort()]
            found = search_scales(weight.t().float(), importance, self.group_size, w, self.dtype, self.search)
            self.scales, self.minima = found
            if self.minima is not None:
                self.values += self.minima[self.groups]
        elif self.regrouped or self.order is None:
            self._search(0, self.values.shape[0])
        else:
            values = weight.t().float().contiguous()
            importance = self.importance[self.order.argsort()]
            self.scales, self.zeros = search_scales(values, importance, self.group_size, w, self.dtype, self.search)
        self.ready = True

    def round_block(self, begin: int, stop: int, factor: Tensor) -> Tensor:
        """Round the rows begin..stop with U's diagonal block; returns their errors, for the rows behind them."""
        values = self.values[begin:stop]
        scales = torch.empty_like(values)
        errors = torch.empty_like(values)
        zeros = None if self.zeros is None else torch.empty_like(values)
        body = rounding_body(values.device)
        step = stop - begin if self.ready else self.group_size  # a block holds whole groups, or lies within one
        for first in range(begin, stop, step):
            last = min(first + step, stop)
            if not self.ready and first % self.group_size == 0:
                self._search(first, min(first + self.group_size, self.values.shape[0]))
            span = slice(first - begin, last - begin)
            scales[span], wide = self._spread(slice(first, last))
            if zeros is not None and wide is not None:
                zeros[span] = wide
            body.round_columns(
                values, factor, (span.start, span.stop), scales, zeros, grid_of(self.scheme.weight), errors
            )
        return errors

    def descend(self, weight: Tensor, moments: Tensor, dampening: float, sweeps: int, block_size: int) -> None:
        """Improve the codes one by one: coordinate descent on the loss with the dampened moments."""
        k = self.values.shape[0]
        order = torch.arange(k, device=weight.device) if self.order is None else self.order
        extra = dampening * float(moments.diagonal().mean())
        body = rounding_body(weight.device)
        grid = grid_of(self.scheme.weight)
        blocks = [slice(begin, min(begin + block_size, k)) for begin in range(0, k, block_size)]
        change = torch.empty_like(self.values)
        for here in blocks:
            scales, zeros = self._spread(here)
            decoded = reference.from_grid(self.values[here], scales, zeros)
            torch.sub(decoded, weight.t()[order[here]].float(), out=change[here])
            if self.minima is not None:
                change[here] -= self.minima[self.groups[here]]
        gradient = torch.empty_like(change)
        for here in blocks:
            torch.mm(moments[order[here]][:, order], change, out=gradient[here])
            gradient[here].add_(change[here], alpha=extra)
        del change
        for sweep in range(sweeps):
            for here in blocks:
                rows = moments[order[here]][:, order]
                corner = rows[:, here].contiguous()
                corner.diagonal().add_(extra)
                scales, zeros = self._spread(here)
                steps = torch.empty_like(scales)
                body.descend_columns(self.values[here], gradient[here], corner, scales, zeros, grid, steps)
                gradient[here.stop :].addmm_(rows[:, here.stop :].t(), steps)
                if sweep + 1 < sweeps:  # nobody comes back to the rows before in the last one
                    gradient[: here.start].addmm_(rows[:, : here.start].t(), steps)

    def _spread(self, here: slice) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points of some rows of values, one for each number."""
        groups = self.groups[here]
        return self.scales[groups], None if self.zeros is None else self.zeros[groups]

    def _search(self, first: int, last: int) -> None:
        """Set the scales of the groups of the rows first..last, which are runs of rows."""
        scales, zeros = search_scales(
            self.values[first:last],
            self.importance[first:last],
            self.group_size,
            self.scheme.weight,
            self.dtype,
            self.search,
        )
        here = slice(first // self.group_size, -(-last // self.group_size))
        self.scales[here] = scales
        if self.zeros is not None and zeros is not None:
            self.zeros[here] = zeros

    def result(self) -> QuantizedWeight:
        """The codes in the order of the columns, and the scales as they are stored."""
        codes = self.values.to(code_type(self.scheme.weight))
        raw = codes.view(torch.uint8).t()
        g_idx = None
        if self.order is not None:
            raw = raw[:, self.order.argsort()]
            if self.regrouped:
                g_idx = self.groups[self.order.argsort()].to(torch.int32)
        scale = self.scales.t() if self.stored is None else self.stored
        zero_point = None if self.zeros is None else self.zeros.t().contiguous().to(torch.int8)
        if self.minima is not None:
            zero_point = self.minima.t().contiguous()
        scale = scale.contiguous().to(kept_type(self.dtype))
        return QuantizedWeight(self.scheme, raw.contiguous().view(codes.dtype), scale, zero_point, g_idx)


def _blocks(k: int, group_size: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most about block_size rows that hold whole groups, or lie within one."""
    size = max(1, block_size // group_size) * group_size
    for outer in range(0, k, size):
        end = min(outer + size, k)
        step = size if size <= block_size else block_size
        for begin in range(outer, end, step):
            yield begin, min(begin + step, end)


def _inverse_factor(moments: Tensor, order: Tensor | None, dampening: float) -> tuple[Tensor, float]:
    """The triangle behind GPTQ, and the dampening used: flipped in both dimensions it is U, U^T U = inverse(H).

    With J the flip and J H J = L L^T, H = (J L J)(J L J)^T, so that U = J L^-1 J: one factorization, where inverting
    first takes three. H is dampened and in the order of rounding.
    """
    k = moments.shape[0]
    backwards = torch.arange(k - 1, -1, -1, device=moments.device) if order is None else order.flip(0)
    h = moments[backwards[:, None], backwards]
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:
        return torch.eye(k, device=moments.device), dampening
    used = dampening
    diagonal.add_(used * mean)
    while True:
        factor, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0 and bool(factor.diagonal().isfinite().all()):
            break
        more = max(2 * used, 0.01)
        if more > MOST_DAMPENING:
            raise WeightError(
                f"the moments of its inputs are not positive definite, with {used:g} of their mean diagonal added even"
            )
        diagonal.add_((more - used) * mean)
        used = more
    del h
    _invert_lower(factor)
    return factor, used


def _invert_lower(triangle: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves."""
    k = triangle.shape[0]
    if k <= TRIANGLE:
        eye = torch.eye(k, device=triangle.device, dtype=triangle.dtype)
        triangle.copy_(torch.linalg.solve_triangular(triangle, eye, upper=False))
        return
    half = k // 2
    first = triangle[:half, :half]
    corner = triangle[half:, :half]
    second = triangle[half:, half:]
    _invert_lower(first)
    _invert_lower(second)
    corner.copy_(-(second @ (corner @ first)))
