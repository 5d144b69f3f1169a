"""The canonical quantized weight, between every on-disk format and every kernel layout, and rounding onto it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.fp4 import reference as fp4
from octavo.quant.scheme import LARGEST, Granularity, QuantScheme, Search, WeightScheme
from octavo.quant.super_blocks import has_own_grid, search_grid

FP8_MAX = LARGEST["fp8_e4m3"]


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear layer's weight as integers (or e4m3 codes) and scales, in no packed layout.

    codes       [N, K] int8 (signed: int4 lies in -8..7), or float8_e4m3fn, which holds each fp4_e2m1 number too
    scale       scheme.weight.granularity.scale_shape(N, K), in the type that the checkpoint stores
    zero_point  None when symmetric, else int8 of scale's shape, in the same signed range as codes; of a scheme with
                minima those, float32
    g_idx       None, or [K] int32: the group of each column (GPTQ act-order)
    input_scale None, or [] float32: the static scale of the input; of an input with e4m3 scales what divides them all
    global_scale None, or [] float32: what divided all the stored e4m3 scales to give `scale`, which is float32 then
    note        what whoever read it from a file has to tell a person about that file
    Owned here: this is the one meaning of the numbers; formats map files to it, kernels pack from it.
    """

    scheme: QuantScheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    g_idx: Tensor | None = None
    input_scale: Tensor | None = None
    global_scale: Tensor | None = None
    note: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for, in float32, then cast."""
        n, k = self.shape
        codes = self.codes.float()
        minima = self.scheme.weight.minima
        if self.zero_point is not None and not minima:
            codes -= self._expand(self.zero_point.float(), n, k)
        codes *= self._expand(self.scale.float(), n, k)
        if self.zero_point is not None and minima:
            codes -= self._expand(self.zero_point, n, k)
        return codes.to(dtype)

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on a device."""
        moved = {
            name: value.to(device)
            for name in ("codes", "scale", "zero_point", "g_idx", "input_scale", "global_scale")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def rows(self, begin: int, stop: int) -> QuantizedWeight:
        """Some of its rows, as views; with blocks, `begin` lies on a block's edge."""
        return self._between(0, begin, stop)

    def columns(self, begin: int, stop: int) -> QuantizedWeight:
        """Some of its columns, as views, of a weight without g_idx; with groups or blocks, `begin` lies on an edge."""
        return self._between(1, begin, stop)

    def with_scales_of_rows(self) -> QuantizedWeight:
        """A weight with scales of blocks as one whose rows each have their own copy: any row may then begin a part."""
        block = self.scheme.weight.granularity.block
        assert block is not None
        n = self.shape[0]
        rows, columns = block
        old = self.scheme.weight
        granularity = Granularity("block", block=(1, columns))
        return replace(
            self,
            scheme=QuantScheme(WeightScheme(old.dtype, granularity, old.symmetric), self.scheme.activation),
            scale=self.scale.repeat_interleave(rows, dim=0)[:n],
            zero_point=None if self.zero_point is None else self.zero_point.repeat_interleave(rows, dim=0)[:n],
        )

    def sorted_by_group(self) -> tuple[QuantizedWeight, Tensor]:
        """A weight with act-order with its columns group after group, and the order [K] int64 of columns for that.

        Its groups have the scheme's size, but the last.
        """
        assert self.g_idx is not None
        order = self.g_idx.long().argsort(stable=True)
        return replace(self, codes=self.codes[:, order], g_idx=None), order

    def _between(self, dim: int, begin: int, stop: int) -> QuantizedWeight:
        granularity = self.scheme.weight.granularity

        def cut(values: Tensor, side: int) -> Tensor:
            part = slice(begin // side, -(-stop // side))
            return values[part] if dim == 0 else values[:, part]

        scale = self.scale
        zero_point = self.zero_point
        if granularity.kind != "tensor":
            side = granularity.tile(*self.shape)[dim]
            scale = cut(scale, side)
            zero_point = None if zero_point is None else cut(zero_point, side)
        return replace(self, codes=cut(self.codes, 1), scale=scale, zero_point=zero_point)

    def _expand(self, per_group: Tensor, n: int, k: int) -> Tensor:
        """Spread one value per group, block, channel or tensor over the weight's elements, [N, K]."""
        granularity = self.scheme.weight.granularity
        match granularity.kind:
            case "tensor" | "channel":
                return per_group.reshape(-1, 1).expand(n, k)
            case "group":
                assert granularity.group_size is not None
                if self.g_idx is not None:
                    return per_group[:, self.g_idx.long()]
                return per_group.repeat_interleave(granularity.group_size, dim=1)[:, :k]
            case "block":
                assert granularity.block is not None
                rows, cols = granularity.block
                return per_group.repeat_interleave(rows, dim=0)[:n].repeat_interleave(cols, dim=1)[:, :k]


Weight = QuantizedWeight | Tensor
"""A linear layer's weight [N, K]: quantized, or plain numbers."""


class WeightError(ValueError):
    """A weight that can't be quantized, such as one with a NaN in it."""


# Fractions of the full range that the MSE search tries, the full range first so that it wins a tie. Below a half no
# group of a trained weight was seen to gain.
SHRINK = tuple(1 - 0.025 * i for i in range(21))
# e2m1's numbers are far apart at its top, so a group may gain where its largest is not the 6: at 1.5 it is the 4.
FP4_SHRINK = (1.0, *(1 + 0.05 * i for i in range(1, 11)), *(1 - 0.05 * i for i in range(1, 9)))
POWERS = (1.0, 0.5, 2.0)
MOST_LOPSIDED_BITS = 4
CHUNK = 1 << 20  # elements worked on at a time: a few times this in float32 stays near the cores' caches


def quantize_weight(
    weight: Tensor,
    scheme: QuantScheme,
    search: Search = "absmax",
    scale_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight [N, K] onto a scheme, without data: every scale comes from the weights that share it.

    absmax: scales cover the whole range, as compressed-tensors' min-max observers choose them: integers [-2^(b-1),
    2^(b-1) - 1] with scale absmax / (2^b - 1) * 2, or (max - min) / (2^b - 1) and a zero point; fp8 absmax / 448, fp4
    absmax / 6, and of powers of two the one that `fp4.mx_exponents` has.
    mse: of the scales that cover a fraction in `fractions_of`, the one with the least squared error.
    global_scale: what divides e4m3 scales; None: this weight's own. Scales of any number are kept in `scale_dtype`
    (None: the weight's own type). Codes are computed against the scale as stored, in float32, rounded half to even;
    both on the weight's device. Raises WeightError for NaN or infinity, and for a scale too large for its type.
    Integers over minima, and those of super-blocks, are always searched, as `search_grid` does.
    """
    n, k = weight.shape
    w = scheme.weight
    if has_own_grid(w):
        return _quantize_on_grid(weight, scheme)
    stored = scale_type(w, scale_dtype or weight.dtype)
    weight, whole = over_global_scale(weight, w, global_scale)
    codes = weight.new_empty(n, k, dtype=code_type(w))
    scale = weight.new_empty(w.granularity.scale_shape(n, k), dtype=kept_type(stored))
    zero_point = None if w.symmetric else torch.empty_like(scale, dtype=torch.int8)
    rows, columns = w.granularity.tile(n, k)
    step = rows * max(1, CHUNK // (rows * k))
    for begin in range(0, n, step):
        here = slice(begin, min(begin + step, n))
        tiled = _Tiles(weight[here], rows, columns)
        s, z = tiled.search(w, stored) if search == "mse" else tiled.absmax(w, stored, 1.0)
        codes[here] = tiled.join(tiled.round(w, s, z))
        groups = slice(begin // rows, -(-here.stop // rows))
        scale[groups] = s.flatten(1)
        if zero_point is not None:
            zero_point[groups] = z.flatten(1).to(torch.int8)
    return of_global_scale(QuantizedWeight(scheme, codes, scale, zero_point), whole)


def _quantize_on_grid(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    if not bool(weight.isfinite().all()):
        raise WeightError("it holds NaN or infinity")
    scale, minima = search_grid(weight, scheme.weight)
    grid = QuantizedWeight(scheme, torch.empty(weight.shape, dtype=torch.int8, device="meta"), scale, minima)
    n, k = weight.shape
    shifted = weight.float() if minima is None else weight.float() + grid._expand(minima, n, k)
    codes = (shifted / grid._expand(scale, n, k)).round_().clamp_(*scheme.weight.int_range)
    return replace(grid, codes=codes.to(torch.int8))


def scale_type(w: WeightScheme, otherwise: torch.dtype) -> torch.dtype:
    """The type that stores the scales of a weight; `otherwise` where they may be any number."""
    bytes_ = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu, "super": torch.float32}
    return bytes_.get(w.scales, otherwise)


def kept_type(stored: torch.dtype) -> torch.dtype:
    """The type of a canonical weight's scales that files store as `stored`: float32 for those of a byte."""
    return torch.float32 if stored.itemsize == 1 else stored


def code_type(w: WeightScheme) -> torch.dtype:
    """The type of a canonical weight's codes."""
    return torch.float8_e4m3fn if w.is_float else torch.int8


def fractions_of(w: WeightScheme, otherwise: tuple[float, ...]) -> tuple[float, ...]:
    """Fractions of a group's range that a search of scales tries, the whole first so that it wins a tie.

    Integers reach one further below zero than above, which counts where they are few: with a scale below zero that is
    on the other side. (Of SmolLM2's block 8 in groups of 64, trying both takes 22% off rounding's KL at 4 bits.)
    Scales that put a group's largest weight on the lowest or the highest code are always tried: of weights that were
    rounded before, or trained for that, they are the very grid.
    """
    if w.scales == "e8m0":
        return POWERS
    if w.dtype == "fp4_e2m1":
        return FP4_SHRINK
    if w.is_float or not w.symmetric:
        return otherwise
    both = (*otherwise, *(-fraction for fraction in otherwise)) if w.bits <= MOST_LOPSIDED_BITS else otherwise
    steps = (1 << w.bits) - 1
    lowest = steps / (steps + 1)
    return (*both, lowest, -lowest, steps / (steps - 1))


def global_scale_of(weights: Iterable[Tensor], w: WeightScheme) -> Tensor | None:
    """What divides the e4m3 scales of weights that engines join (q, k, v; gate, up), []; None for other scales."""
    if w.scales != "e4m3":
        return None
    return fp4.nvfp4_global_scale(torch.stack([weight.abs().amax().float().cpu() for weight in weights]).amax())


def over_global_scale(weight: Tensor, w: WeightScheme, global_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A weight times the number that divides its e4m3 scales, and that number []; other weights as they are, and None.

    Of the product scales are plain e4m3 numbers, so whatever searches them need not know of the number.
    """
    if w.scales != "e4m3":
        return weight, None
    values = weight.float()
    whole = fp4.nvfp4_global_scale(values.abs().amax()) if global_scale is None else global_scale
    return values * whole.to(values.device), whole


def of_global_scale(weight: QuantizedWeight, whole: Tensor | None) -> QuantizedWeight:
    """The weight whose multiple by `over_global_scale` was rounded."""
    return (
        weight
        if whole is None
        else replace(weight, scale=weight.scale.float() / whole.to(weight.scale.device), global_scale=whole)
    )


class _Tiles:
    """Some rows of a weight, cut into the tiles that share a scale: [R, rows, C, columns] float32.

    Short tiles at the edges are filled up with zeros, which never move a scale: zero is always in range.
    """

    def __init__(self, weight: Tensor, rows: int, columns: int) -> None:
        self.shape = n, k = weight.shape
        padded = weight.float()
        if n % rows or k % columns:
            padded = F.pad(padded, (0, -k % columns, 0, -n % rows))
        self.values = padded.view(-(-n // rows), rows, -(-k // columns), columns)
        # Two reductions in a row are several times faster than one over both dimensions.
        self.low = self.values.amin(3, keepdim=True).amin(1, keepdim=True).clamp(max=0)  # [R, 1, C, 1]
        self.high = self.values.amax(3, keepdim=True).amax(1, keepdim=True).clamp(min=0)
        if not bool((self.high - self.low).isfinite().all()):
            raise WeightError("it holds NaN or infinity")

    def join(self, tiles: Tensor) -> Tensor:
        """Back to the rows' own shape, without the filling."""
        n, k = self.shape
        return tiles.view(tiles.shape[0] * tiles.shape[1], -1)[:n, :k]

    def absmax(self, w: WeightScheme, dtype: torch.dtype, shrink: float) -> tuple[Tensor, Tensor]:
        """Scales that cover `shrink` of each tile's range, float32 but rounded to `dtype`, and zero points."""
        zero = torch.zeros_like(self.low)
        if w.scales == "e8m0":
            exponents = fp4.mx_exponents(torch.maximum(-self.low, self.high) * shrink, w.dtype)
            return fp4.e8m0_to_float(exponents), zero
        if w.is_float:
            most = fp4.E2M1_MAX if w.dtype == "fp4_e2m1" else FP8_MAX
            return storable(torch.maximum(-self.low, self.high) * (shrink / most), dtype), zero
        steps = (1 << w.bits) - 1
        if w.symmetric:
            return storable(torch.maximum(-self.low, self.high) * (2 * shrink / steps), dtype), zero
        scale = storable((self.high - self.low) * (shrink / steps), dtype)
        least, most = w.int_range
        return scale, (least - self.low * shrink / scale).round().clamp(least, most)

    def search(self, w: WeightScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the scales that cover some fraction of the range, each tile's with the least squared error."""
        fractions = fractions_of(w, SHRINK)
        best_scale, best_zero = self.absmax(w, dtype, fractions[0])
        best = self._error(w, best_scale, best_zero)
        for shrink in fractions[1:]:
            scale, zero = self.absmax(w, dtype, shrink)
            error = self._error(w, scale, zero)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def round(self, w: WeightScheme, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of all tiles, in their own type."""
        if w.dtype == "fp8_e4m3":
            return (self.values / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        if w.dtype == "fp4_e2m1":
            return fp4.round_to_e2m1(self.values / scale).to(torch.float8_e4m3fn)
        return self._integers(w, scale, zero_point).to(torch.int8)

    def _integers(self, w: WeightScheme, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = (self.values / scale).round_()
        if not w.symmetric:
            codes += zero_point
        return codes.clamp_(*w.int_range)

    def _error(self, w: WeightScheme, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Squared error of each tile, [R, 1, C, 1]."""
        if w.is_float:
            decoded = self.round(w, scale, zero_point).float()
        else:
            decoded = self._integers(w, scale, zero_point)
            if not w.symmetric:
                decoded -= zero_point
        return decoded.mul_(scale).sub_(self.values).square_().sum(3, keepdim=True).sum(1, keepdim=True)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be stored. Raises WeightError for one beyond its type."""
    stored = as_stored(scale, dtype)
    if not bool(stored.isfinite().all()):
        raise WeightError(f"a scale of {float(scale.abs().max()):.3g} is needed, which {str(dtype)[6:]} can't hold")
    return stored


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to the type that they will be stored in, as float32, never 0 (a tile of zeros) nor near it.

    e4m3 saturates, and has its subnormals; scales of other types may be below zero, and are infinite beyond their type.

    float16 is subnormal below 6e-5, where scales of 8-bit weights lie, so there subnormals are allowed down to where
    rounding moves a scale by 1 in 128.
    """
    if dtype == torch.float8_e4m3fn:
        return scale.clamp(2.0**-9, FP8_MAX).to(dtype).float()
    least = 2.0**-18 if dtype == torch.float16 else torch.finfo(dtype).tiny
    stored = scale.to(dtype).float()
    return torch.where(stored < 0, stored.clamp(max=-least), stored.clamp(min=least))
