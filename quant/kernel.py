"""A kernel as a row of facts: which weights and inputs it multiplies, in which shapes, on which devices.

Nothing here reads a weight's numbers or imports a kernel; `octavo.quant.kernel_table` has the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.kernels.int4.reference import group_of_column
from octavo.quant.body import Body
from octavo.quant.qparams import Weight
from octavo.quant.scheme import ActivationScheme, QuantScheme, Scales
from octavo.quant.target import Target

Order = Literal["sorted", "permuted", "uneven"]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerShape:
    """What of a weight, beside its scheme, decides which kernels can multiply it.

    rows, columns  [N, K] of a linear layer; of a mixture, of the wider of gate_up and down
    experts        0: one linear layer; else the number of experts that are to be multiplied together
    order          of columns: 'sorted' group after group; 'permuted', in groups of the scheme's size (act-order);
                   'uneven', in groups of other sizes
    has_nan        among e4m3 codes
    """

    rows: int
    columns: int
    experts: int = 0
    order: Order = "sorted"
    has_nan: bool = False


@dataclass(frozen=True)
class Kernel:
    """A row of the table: what a kernel serves, and its functions.

    name            as the table at start calls it
    how             what it computes, for a person
    where           'cpu', 'gpu', or 'any': torch's own operators
    load            imports the kernel and returns its functions; None: of experts, which octavo.quant.experts packs
    storages        types of weights; 'dense': not quantized
    inputs          the input schemes that it computes as they say; None: the scheme rounds no input
    keeps_inputs    it also serves schemes of any input, which it leaves unrounded
    rounds_inputs   it also serves schemes of any input, rounded by torch before
    kinds, blocks   granularities of the weight; blocks (): any
    group_multiple  columns that share a scale are a multiple of this, or among group_sizes, or all of a row
    column_multiple columns are a multiple of this
    whole_groups    the last group is not short, and a row is a multiple of group_multiple, too
    orders          of columns
    scales          how formats store them: a kernel may hold some in fewer bits
    dequantizes     the weight is dequantized at load: more bytes than are stored
    minima          it serves weights over minima, too
    batch_invariant a row's output has the same bits whatever other rows are multiplied with it, and however many.
                    tests/kernels/test_batch_invariant.py proves it; False: it isn't so, or nobody has proven it
    """

    name: str
    how: str
    where: Literal["cpu", "gpu", "any"]
    load: Callable[[], Body] | None
    storages: tuple[str, ...]
    inputs: tuple[ActivationScheme | None, ...] = (None,)
    keeps_inputs: bool = False
    rounds_inputs: bool = False
    kinds: tuple[str, ...] = ("tensor", "channel", "group", "block")
    blocks: tuple[tuple[int, int], ...] = ()
    group_multiple: int = 1
    group_sizes: tuple[int, ...] = ()
    column_multiple: int = 1
    whole_groups: bool = False
    symmetric_only: bool = False
    orders: tuple[Order, ...] = ("sorted",)
    scales: tuple[Scales, ...] = ("float", "e4m3", "e8m0", "super")
    takes_nan: bool = True
    max_columns: int | None = None
    capability: int = 0
    dtypes: tuple[torch.dtype, ...] = HALF
    experts: bool = False
    dequantizes: bool = False
    minima: bool = False
    batch_invariant: bool = False

    @property
    def body(self) -> Body:
        """Its functions, imported."""
        assert self.load is not None, self.name
        return self.load()

    def is_for(self, scheme: QuantScheme | None, shape: LayerShape, target: Target) -> bool:
        """Whether it is made for such weights and inputs on such a device, whatever their sizes."""
        runs = {"cpu": target.device.type == "cpu", "gpu": target.capability > 0, "any": True}[self.where]
        storage = "dense" if scheme is None else scheme.weight.dtype
        if not runs or storage not in self.storages or self.experts != (shape.experts > 0):
            return False
        return activation_of(scheme) in self.inputs

    def refusals(self, scheme: QuantScheme | None, shape: LayerShape, target: Target) -> Iterator[str]:
        """Why it can't multiply a weight that it `is_for`; nothing: it can."""
        if target.dtype not in self.dtypes:
            yield f"this kernel computes in {' or '.join(str(dtype)[6:] for dtype in self.dtypes)}"
        if self.where == "cpu" and not target.has_dot_products:
            yield "this processor has no AVX-512 with BF16 and VNNI"
        if target.many_tokens and self.where == "cpu" and None in self.inputs:
            yield "torch multiplies the many tokens of an image faster"
        if target.capability < self.capability:
            major, minor = divmod(target.capability, 10)
            yield f"fp8 products need compute capability 8.9 (L40S, 4090, H100) and this GPU has {major}.{minor}"
        if self.max_columns is not None and shape.columns > self.max_columns:
            yield f"sums of int8 products are exact up to {self.max_columns:,} columns, and it has {shape.columns:,}"
        if shape.order not in self.orders:
            how = "in groups of unequal sizes" if shape.order == "uneven" else "in another order than its groups"
            yield f"its columns are {how} (act-order)"
        if shape.has_nan and not self.takes_nan:
            yield "its e4m3 codes hold a NaN"
        if shape.columns % self.column_multiple:
            yield f"{shape.columns} columns are not a multiple of {self.column_multiple}"
        if scheme is not None:
            yield from self._refuses_scales(scheme, shape)

    def _refuses_scales(self, scheme: QuantScheme, shape: LayerShape) -> Iterator[str]:
        weight = scheme.weight
        per = weight.granularity
        if per.kind not in self.kinds or (per.block is not None and self.blocks and per.block not in self.blocks):
            yield f"the kernel has no scales per {per}"
        if weight.scales not in self.scales:
            yield f"its scales are {weight.scales}, not {' or '.join(self.scales)}"
        if weight.minima and not self.minima:
            yield "its integers lie over minima, which are no zero points"
        if self.symmetric_only and not weight.symmetric:
            yield "products of rounded inputs have no zero points"
        size = per.tile(shape.rows, shape.columns)[1]
        if self.whole_groups:
            whole = min(size, shape.columns) if per.kind != "group" else size
            fits = shape.columns % whole == 0 and whole % self.group_multiple == 0
        else:
            fits = size >= shape.columns or size in self.group_sizes or size % self.group_multiple == 0
        if not fits:
            sizes = (*map(str, self.group_sizes), f"multiples of {self.group_multiple}")
            ends = " that fill a row" if self.whole_groups else ""
            yield f"groups of {min(size, shape.columns)} of {shape.columns} columns, not {', '.join(sizes)}{ends}"


def shape_of(weight: Weight) -> LayerShape:
    """All that `choose_kernel` asks of one weight [N, K], but a search for NaN."""
    rows, columns = weight.shape
    if isinstance(weight, Tensor) or weight.g_idx is None:
        return LayerShape(rows, columns)
    size = weight.scheme.weight.granularity.tile(rows, columns)[1]
    return LayerShape(rows, columns, order=order_of(weight.g_idx, size))


def order_of(g_idx: Tensor, group_size: int) -> Order:
    """How columns stand whose groups are g_idx [K]."""
    groups = g_idx.cpu().long()
    in_order = group_of_column(len(groups), group_size)
    if torch.equal(groups, in_order):
        return "sorted"
    return "permuted" if torch.equal(groups.sort()[0], in_order) else "uneven"


def activation_of(scheme: QuantScheme | None) -> ActivationScheme | None:
    return None if scheme is None else scheme.activation
