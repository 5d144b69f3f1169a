"""Which kernel multiplies which weight where: one table, and one pure function that everybody asks.

Linear layers, a mixture's experts, the output head and `octavo inspect` all call `choose_kernel`. It reads no tensor,
imports no kernel, and the reason that it returns is what a user is told at start. The first row that serves a weight
is taken: rows that multiply rounded inputs stand before those that leave inputs as they are, and the weight
dequantized at load comes last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.kernels.fp8.reference import has_nan
from octavo.kernels.gemm.limits import (
    FP8_BLOCK,
    INT4_TILE,
    MAX_INT8_COLUMNS_CPU,
    MAX_INT8_COLUMNS_GPU,
    MIN_GROUP,
    STEP_OF_INTEGERS,
)
from octavo.quant import bodies_cpu, bodies_gpu, bodies_torch
from octavo.quant.input_rounding import dynamic_rounding
from octavo.quant.kernel import HALF, Kernel, LayerShape, activation_of, shape_of
from octavo.quant.qparams import Weight
from octavo.quant.scheme import BITS, CHANNEL, TENSOR, ActivationScheme, QuantScheme, SchemeError, group
from octavo.quant.target import Target

TOKEN_FP8 = ActivationScheme("fp8_e4m3", CHANNEL)
STATIC_FP8 = ActivationScheme("fp8_e4m3", TENSOR, dynamic=False)
GROUPS_FP8 = ActivationScheme("fp8_e4m3", group(FP8_BLOCK))
TOKEN_INT8 = ActivationScheme("int8", CHANNEL)
STATIC_INT8 = ActivationScheme("int8", TENSOR, dynamic=False)
FEW_BITS = ("int4", "int3", "int2")
BYTES = ("int8", "int6", "int5")  # integers that lie in a byte each
STORAGES = tuple(name for name in BITS if name != "bf16")
ROWS = ("tensor", "channel")  # a scale for the weight, or for each of its rows
GROUPS = ("channel", "group")

_FP8 = Kernel("fp8 x fp8", "fp8 products, inputs rounded", "gpu", bodies_gpu.eight_bits, ("fp8_e4m3",), capability=89)
_INT8 = Kernel(
    "int8 x int8",
    "int8 products, inputs rounded",
    "gpu",
    bodies_gpu.eight_bits,
    ("int8",),
    kinds=ROWS,
    symmetric_only=True,
    max_columns=MAX_INT8_COLUMNS_GPU,
)
GPU_PRODUCTS = (
    replace(_FP8, name="fp8 x fp8, token", how=f"{_FP8.how} per token", inputs=(TOKEN_FP8,), kinds=ROWS),
    replace(_FP8, name="fp8 x fp8, static", how=f"{_FP8.how} by a stored scale", inputs=(STATIC_FP8,), kinds=ROWS),
    replace(
        _FP8,
        name="fp8 x fp8, blocks",
        how=f"{_FP8.how} per token and {FP8_BLOCK} columns",
        inputs=(GROUPS_FP8,),
        kinds=("block",),
        blocks=((FP8_BLOCK, FP8_BLOCK), (1, FP8_BLOCK)),
    ),
    replace(_INT8, how=f"{_INT8.how} per token", inputs=(TOKEN_INT8,)),
    replace(_INT8, name="int8 x int8, static", how=f"{_INT8.how} by a stored scale", inputs=(STATIC_INT8,)),
    *(
        Kernel(
            f"{dtype} weights{' in 4 bits' if dtype == 'int3' else ''}, fp8",
            f"{dtype} weights decoded to fp8 in registers, inputs rounded to fp8 per token",
            "gpu",
            bodies_gpu.decoded_fp8,
            (dtype,),
            inputs=(TOKEN_FP8,),
            kinds=GROUPS,
            orders=("sorted", "permuted", "uneven"),
            capability=89,
        )
        for dtype in FEW_BITS
    ),
)
"""Of rounded inputs."""

_BYTES = tuple(
    Kernel(
        f"{short} weights, 16 bits",
        f"{short} weights decoded in registers",
        "gpu",
        bodies_gpu.decoded,
        (dtype,),
        keeps_inputs=True,
        group_multiple=MIN_GROUP,
        orders=("sorted", "permuted"),
        takes_nan=False,
    )
    for dtype, short in (*((dtype, dtype) for dtype in BYTES), ("fp8_e4m3", "fp8"))
)
_FEW = tuple(
    Kernel(
        f"{dtype} weights{' in 4 bits' if dtype == 'int3' else ''}, 16 bits",
        f"{dtype} weights decoded in registers",
        "gpu",
        bodies_gpu.decoded,
        (dtype,),
        keeps_inputs=True,
        kinds=GROUPS,
        orders=("sorted", "permuted", "uneven"),
    )
    for dtype in FEW_BITS
)
GPU_WEIGHTS = (
    *_FEW,
    *_BYTES,
)
"""Decoded in registers, inputs in 16 bits."""

_CPU_INTEGERS = tuple(
    Kernel(
        f"{dtype} weights {f'in {bits} bits ' if bits != BITS[dtype] else ''}x bf16",
        f"{dtype} weights decoded to bf16 in registers",
        "cpu",
        bodies_cpu.integers,
        (dtype,),
        kinds=GROUPS,
        group_multiple=STEP_OF_INTEGERS[bits],
        whole_groups=True,
        dtypes=(torch.bfloat16,),
        minima=True,
        batch_invariant=True,
    )
    for dtype, bits in (
        ("int8", 8),
        *((dtype, bits) for dtype in ("int6", "int5") for bits in (BITS[dtype], 8)),
        *((dtype, 4) for dtype in FEW_BITS),
    )
)
_CPU_BF16 = Kernel(
    "bf16 x bf16",
    "bf16 dot products",
    "cpu",
    bodies_cpu.bf16,
    ("dense",),
    column_multiple=2,
    dtypes=(torch.bfloat16,),
    batch_invariant=True,
)
_CPU_FP4 = Kernel(
    "fp4 weights x bf16",
    "fp4 weights decoded to bf16 in registers",
    "cpu",
    bodies_cpu.fp4,
    ("fp4_e2m1",),
    kinds=("group",),
    group_multiple=8,
    whole_groups=True,
    scales=("e4m3", "e8m0"),
    dtypes=(torch.bfloat16,),
    batch_invariant=True,
)
CPU = (
    Kernel(
        "int8 x int8 VNNI",
        "int8 dot products, inputs rounded per token",
        "cpu",
        bodies_cpu.int8,
        ("int8",),
        inputs=(TOKEN_INT8,),
        kinds=("channel",),
        symmetric_only=True,
        max_columns=MAX_INT8_COLUMNS_CPU,
        batch_invariant=True,
    ),
    *(
        Kernel(
            f"{dtype} {'in 4 bits ' if dtype in ('int3', 'int2') else ''}x int8 VNNI",
            f"dot products of {dtype} weights with int8 inputs, rounded per token",
            "cpu",
            bodies_cpu.int4,
            (dtype,),
            inputs=(TOKEN_INT8,),
            kinds=GROUPS,
            group_multiple=8,
            whole_groups=True,
            symmetric_only=True,
            batch_invariant=True,
        )
        for dtype in FEW_BITS
    ),
    *_CPU_INTEGERS,
    *(
        replace(
            row,
            name=f"{row.name}, columns in order of their groups",
            load=bodies_cpu.permuted_integers,
            orders=("permuted",),
        )
        for row in _CPU_INTEGERS
    ),
    _CPU_FP4,
    *(
        replace(
            row,
            name=f"{row.name}, inputs rounded before",
            how=f"{row.how}, inputs rounded as the scheme says",
            load=load,
            rounds_inputs=True,
        )
        for row, load in (
            *((row, bodies_cpu.integers_rounding) for row in _CPU_INTEGERS),
            (_CPU_FP4, bodies_cpu.fp4_rounding),
        )
    ),
    _CPU_BF16,
)

_TORCH = tuple(
    Kernel(f"torch {str(dtype)[6:]}", "torch's own product", "any", bodies_torch.dense, ("dense",), dtypes=(dtype,))
    for dtype in (torch.float32, *HALF)
)
_CPU_FLOAT32 = Kernel(
    "float32 x float32",
    "float32 products, added in the order of columns",
    "cpu",
    bodies_cpu.float32,
    ("dense",),
    dtypes=(torch.float32, *HALF),
    batch_invariant=True,
)
INVARIANT = (_CPU_FLOAT32,)
"""Behind torch's own, which serve the same: these are chosen only where torch's may not be."""

DEQUANTIZED = tuple(
    replace(
        row,
        name=f"dequantized at load, {row.name}",
        storages=STORAGES,
        orders=("sorted", "permuted", "uneven"),
        dequantizes=True,
        minima=True,
        load=load,
        keeps_inputs=not rounds,
        rounds_inputs=bool(rounds),
    )
    for row, bodies in (
        (_CPU_BF16, (bodies_cpu.dequantized, bodies_cpu.dequantized_rounding)),
        *((row, (bodies_torch.dequantized, bodies_torch.dequantized_rounding)) for row in _TORCH),
        (_CPU_FLOAT32, (bodies_cpu.dequantized_float32, bodies_cpu.dequantized_float32_rounding)),
    )
    for rounds, load in enumerate(bodies)
)


def _of_experts(row: Kernel) -> Kernel:
    """A GPU's row as that of a mixture's experts, multiplied together."""
    row = replace(row, name=f"grouped by expert, {row.name}", load=None, experts=True)
    if row.storages[0] in FEW_BITS:
        small = (MIN_GROUP, INT4_TILE // 2)
        return replace(row, orders=("sorted", "permuted"), group_multiple=INT4_TILE, group_sizes=small)
    return row if row.inputs != (None,) else replace(row, orders=("sorted", "permuted"))


ALONE = Kernel(
    "one by one",
    "each expert is a linear layer of its own",
    "any",
    None,
    ("dense", *STORAGES),
    keeps_inputs=True,
    rounds_inputs=True,
    orders=("sorted", "permuted", "uneven"),
    dtypes=(torch.float32, *HALF),
    minima=True,
    experts=True,
)
EXPERTS = (
    *(_of_experts(row) for row in GPU_PRODUCTS if row.inputs != (STATIC_INT8,)),
    *(_of_experts(row) for row in (*_FEW, *_BYTES)),
    Kernel("grouped by expert", "16-bit products", "gpu", None, ("dense",), experts=True),
    ALONE,
)
TABLE = (*GPU_PRODUCTS, *GPU_WEIGHTS, *CPU, *_TORCH, *INVARIANT, *DEQUANTIZED, *EXPERTS)
ONE_BY_ONE = "a mixture's experts run one by one, and decode steps without CUDA graphs"


@dataclass(frozen=True)
class KernelChoice:
    """The kernel that serves a weight, and why.

    departs  what runs differs from what the checkpoint says, or costs more than its bits: a user is told at start
    """

    kernel: Kernel
    reason: str
    departs: bool = False


def choose_kernel(scheme: QuantScheme | None, shape: LayerShape, target: Target) -> KernelChoice:
    """The first row of the table that serves a weight of a scheme (None: not quantized), with the reason.

    Raises SchemeError for a scheme whose inputs nothing here can round, and where the target takes only batch-invariant
    kernels and none serves the weight.
    """
    activation = activation_of(scheme)
    if activation is not None and not activation.has_stored_scale:
        dynamic_rounding(activation)  # a scheme that nothing rounds by is refused whoever serves it
    for kernel in TABLE:
        if _serves(kernel, scheme, shape, target):
            return _with_reason(kernel, scheme, shape, target)
    assert target.batch_invariant, "the last rows of the table serve everything"
    what = target.dtype_name if scheme is None else str(scheme)
    why = _cause_of_variance(scheme, shape, target)
    raise SchemeError(f"no batch-invariant kernel multiplies {what} [{shape.rows}, {shape.columns}]: {why}")


def choose_for(weight: Weight, target: Target) -> KernelChoice:
    """`choose_kernel` for a linear layer's weight. Its codes are looked through only if a NaN among them matters."""
    scheme = None if isinstance(weight, Tensor) else weight.scheme
    shape = shape_of(weight)
    found = choose_kernel(scheme, shape, target)
    if found.kernel.takes_nan or isinstance(weight, Tensor) or not has_nan(weight.codes):
        return found
    return choose_kernel(scheme, replace(shape, has_nan=True), target)


def note_departures(choices: Iterable[KernelChoice], notes: list[str]) -> None:
    """Say once, for each scheme, why a kernel departs from what the checkpoint says."""
    for choice in choices:
        if choice.departs and choice.reason not in notes:
            notes.append(choice.reason)


def one_by_one(why: str) -> KernelChoice:
    """The choice for experts that can't be multiplied together: each is a linear layer of its own."""
    return KernelChoice(ALONE, f"{ONE_BY_ONE}: {why}", departs=True)


def _serves(kernel: Kernel, scheme: QuantScheme | None, shape: LayerShape, target: Target) -> bool:
    if target.batch_invariant and not kernel.batch_invariant:
        return False
    if not kernel.is_for(scheme, shape, target):
        activation = activation_of(scheme)
        kept = kernel.keeps_inputs and target.keeps_inputs
        rounded = kernel.rounds_inputs and not target.keeps_inputs
        if activation is None or scheme is None or not (kept or rounded):
            return False
        if not kernel.is_for(QuantScheme(scheme.weight), shape, target):
            return False
    return next(kernel.refusals(scheme, shape, target), None) is None


def _with_reason(kernel: Kernel, scheme: QuantScheme | None, shape: LayerShape, target: Target) -> KernelChoice:
    if kernel is ALONE:
        asked = QuantScheme(scheme.weight) if scheme is not None and target.keeps_inputs else scheme
        return one_by_one(_cause(asked, shape, target))
    if kernel.dequantizes and target.dtype == torch.float32:
        return KernelChoice(kernel, "float32 computes with dequantized weights, inputs rounded as the scheme says")
    kept = activation_of(scheme) not in kernel.inputs and kernel.keeps_inputs and target.keeps_inputs
    if scheme is None or not (kernel.dequantizes or kept):
        return KernelChoice(kernel, kernel.how)
    why = _cause(scheme, shape, target)
    if not kernel.dequantizes:
        said = f"inputs stay in {target.dtype_name}, and weights are what is quantized: {why}"
    elif kept:
        of_weights = _cause(QuantScheme(scheme.weight), shape, target)
        faster = ", which is faster than rounding them before" if target.many_tokens else ""
        said = (
            f"weights are dequantized to {target.dtype_name} at load: {of_weights}; inputs stay as they are{faster}: "
        )
        said += why
    else:
        rounded = "" if scheme.activation is None else ", inputs rounded as the scheme says"
        said = f"weights are dequantized to {target.dtype_name} at load{rounded}: {why}"
    return KernelChoice(kernel, f"{scheme}: {said}", departs=True)


def _cause_of_variance(scheme: QuantScheme | None, shape: LayerShape, target: Target) -> str:
    """Why the batch-invariant rows don't serve a weight."""
    if target.capability:
        return "no kernel of a GPU is known to be; a CPU with AVX-512 BF16 and VNNI has such kernels"
    if shape.experts:
        return "no kernel multiplies experts together so; each is a linear layer of its own on a CPU"
    rows = [row for row in TABLE if row.batch_invariant and target.dtype in row.dtypes]
    return next((why for row in rows for why in row.refusals(scheme, shape, target)), f"none computes in {target}")


def _cause(scheme: QuantScheme | None, shape: LayerShape, target: Target) -> str:
    """Why the row that is made for a scheme doesn't serve it; or that there is none."""
    meant = [kernel for kernel in TABLE if not kernel.dequantizes and kernel.is_for(scheme, shape, target)]
    causes = (cause for kernel in meant for cause in kernel.refusals(scheme, shape, target))
    what = "grouped GEMM" if shape.experts else "kernel"
    of = f"{scheme.weight.dtype} weights" if scheme is not None and scheme.activation is None else "such products"
    return next(causes, f"no {what} here has {of}" if target.capability else f"no {what} of a CPU has {of}")
