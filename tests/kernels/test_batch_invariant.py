"""Kernels of a CPU that say they are batch-invariant: a row's output has the same bits whatever is computed beside it.

The truth is each row by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from attention_steps import make_cache, make_step
from slow_cases import slow
from torch import Tensor

from octavo.calibration.recipe import parse_scheme
from octavo.kernels.attention.cache import AttentionShape
from octavo.kernels.attention.cpu import invariant_attention, paged_attention
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.native import cpu_features
from octavo.quant.body import PackOptions
from octavo.quant.kernel import Kernel, LayerShape
from octavo.quant.kernel_table import INVARIANT, TABLE, choose_kernel
from octavo.quant.qparams import Weight, quantize_weight
from octavo.quant.scheme import CHANNEL, PRESETS, QuantScheme, SchemeError, WeightScheme, group
from octavo.quant.target import Target
from octavo.runtime.model.rope import RopeSpec, RopeTable
from octavo.runtime.model.select_operators import select_ops

CPU = torch.device("cpu")
SHAPE = LayerShape(256, 512)
pytestmark = pytest.mark.skipif(not cpu_features.has_dot_products(), reason="needs AVX-512 BF16 and VNNI")
K = 256
ROWS = [row for row in TABLE if row.batch_invariant]
FEW = (2, 3, 5, 9, 140)  # over the edges of tiles, and of the chunks of an item
MANY = (2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 64, 100, 128, 129, 140)


def pieces(count: int, size: int, rng: random.Random) -> Iterator[list[int]]:
    """All of `count` rows in a random order, `size` at a time; the last ones are fewer."""
    order = rng.sample(range(count), count)
    for begin in range(0, count, size):
        yield order[begin : begin + size]


def check(run: Callable[[Tensor], Tensor], x: Tensor, counts: tuple[int, ...]) -> None:
    """Each row of run(x), in company of any size, is that of the row by itself."""
    rng = random.Random(0)
    alone = torch.cat([run(x[i : i + 1]) for i in range(len(x))])
    assert len(alone.unique(dim=0)) == len(x)  # rows that differ, so that a row in another's place is seen
    for size in counts:
        for rows in pieces(len(x), size, rng):
            assert torch.equal(run(x[rows]), alone[rows]), size


def weights_for(row: Kernel, num_rows: int) -> list[Weight]:
    """Weights [num_rows, K] that a row serves, with zero points and act-order where it takes them."""
    values = torch.randn(num_rows, K) * 0.1
    storage = row.storages[0]
    if storage == "dense":
        return [values]
    if storage == "fp4_e2m1":
        names = ("NVFP4", "MXFP4") if row.rounds_inputs else ("NVFP4A16", "MXFP4A16")
        made = [quantize_weight(values, PRESETS[name]) for name in names]
        return [replace(weight, input_scale=torch.tensor(500.0)) for weight in made]
    if row.rounds_inputs and not row.dequantizes:
        scheme = QuantScheme(WeightScheme(storage, group(32), symmetric=False), PRESETS["W4AFP8"].activation)  # type: ignore[arg-type]
        return [quantize_weight(values, scheme)]
    if row.rounds_inputs:
        return [quantize_weight(values, PRESETS[name]) for name in ("FP8_DYNAMIC", "FP8_BLOCK")]
    permuted = "permuted" in row.orders and not row.dequantizes
    per = CHANNEL if row.kinds == ("channel",) else group(32)
    weight = WeightScheme(storage, per, row.symmetric_only or storage == "fp8_e4m3")  # type: ignore[arg-type]
    made = quantize_weight(values, QuantScheme(weight, row.inputs[0]))
    return [replace(made, g_idx=(torch.randperm(K) // 32).int()) if permuted else made]


@pytest.mark.parametrize(
    ("row", "num_rows"),
    [(row, 80) for row in ROWS] + [slow(row, num_rows) for row in ROWS for num_rows in (1, 40, 80, 1000)],
    ids=lambda value: value.name if isinstance(value, Kernel) else str(value),
)
def test_a_layer_has_the_same_bits_for_a_row_in_any_company(
    row: Kernel, num_rows: int, request: pytest.FixtureRequest
) -> None:
    """Of an output in float32, where every bit of a sum shows."""
    counts = FEW if request.node.get_closest_marker("slow") is None else MANY
    torch.manual_seed(0)
    for weight, dtype in product(weights_for(row, num_rows), row.dtypes):
        target = Target.of(CPU, dtype, batch_invariant=True)
        packed = row.body.pack(weight, PackOptions(target, torch.float32))
        x = torch.randn(140, K).to(dtype)
        check(lambda x, packed=packed: row.body.run(x, packed, torch.float32), x, counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float32_products_are_those_of_float64(dtype: torch.dtype) -> None:
    """A chain of K multiply-adds is off by K roundings of the sum of what is added, at most."""
    torch.manual_seed(0)
    x = torch.randn(37, K).to(dtype)
    weight = torch.randn(75, K).to(dtype)
    (row,) = INVARIANT
    target = Target.of(CPU, dtype, batch_invariant=True)
    got = row.body.run(x, row.body.pack(weight, PackOptions(target, torch.float32)), torch.float32)
    exact = x.double() @ weight.double().T
    bound = K * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [None, "W8A8", "W4A16@32", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_the_mode_chooses_such_kernels_alone(name: str | None, dtype: torch.dtype) -> None:
    scheme = None if name is None else parse_scheme(name)
    target = Target(CPU, dtype, has_dot_products=True, batch_invariant=True)
    assert choose_kernel(scheme, SHAPE, target).kernel.batch_invariant
    usual = choose_kernel(scheme, SHAPE, replace(target, batch_invariant=False)).kernel
    assert "float32 x float32" not in usual.name
    if usual.batch_invariant:
        assert choose_kernel(scheme, SHAPE, target).kernel is usual


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (Target(torch.device("cuda"), torch.bfloat16, 90), "no kernel of a GPU is known to be"),
        (Target(CPU, torch.bfloat16), "this processor has no AVX-512 with BF16 and VNNI"),
    ],
)
def test_what_has_no_such_kernel_is_refused_by_name(target: Target, why: str) -> None:
    with pytest.raises(SchemeError, match=f"no batch-invariant kernel multiplies int8.*: {why}"):
        choose_kernel(PRESETS["W8A8"], SHAPE, replace(target, batch_invariant=True))


@pytest.mark.parametrize(
    ("dtype", "stored", "dim", "window", "soft_cap"),
    [
        (torch.bfloat16, (torch.bfloat16, torch.bfloat16), 64, None, None),
        (torch.float32, (torch.float32, torch.float32), 32, 100, None),
        slow(torch.bfloat16, (torch.bfloat16, torch.float8_e4m3fn), 96, 37, 30.0),
        slow(torch.bfloat16, (torch.int8, torch.int8), 128, 100, None),
        slow(torch.bfloat16, (torch.bfloat16, torch.bfloat16), 16, 3, None),
        slow(torch.float32, (torch.float8_e4m3fn, torch.float8_e4m3fn), 48, None, 20.0),
        slow(torch.float16, (torch.float16, torch.float16), 64, 100, 50.0),
    ],
    ids=str,
)
def test_attention_of_a_query_has_the_same_bits_in_any_step(
    dtype: torch.dtype, stored: tuple[torch.dtype, torch.dtype], dim: int, window: int | None, soft_cap: float | None
) -> None:
    """As a decode step of its own, in chunks of a prompt, and with other sequences before and behind it."""
    torch.manual_seed(0)
    length = 300
    shape = AttentionShape(6, 2, dim, dim**-0.5, window, soft_cap)
    step = make_step([length, 40, 1], [length, 90, 17], 8, CPU)
    cache = make_cache(int(step.block_tables.max()) + 1, 2, 8, dim, *stored, CPU)
    q = torch.randn(len(step.token_ids), 6, dim).to(dtype)
    alone = invariant_attention(q, step, cache, shape)[:length]
    first, second, third = step.block_tables
    parts = q.split([length, 40, 1])
    for size in (1, 2, 3, 7, 16, 50, 100):
        for begin in range(0, length, size if size > 3 else 29):
            end = min(length, begin + size)
            new = parts[0][begin:end]
            cut = StepInputs.prefill([end], 8, sizes=[end - begin], tables=first[None])
            assert torch.equal(invariant_attention(new, cut, cache, shape), alone[begin:end]), (begin, end)
            tables = torch.stack([second, first, third])
            mixed = StepInputs.prefill([90, end, 17], 8, sizes=[40, end - begin, 1], tables=tables)
            together = invariant_attention(torch.cat([parts[1], new, parts[2]]), mixed, cache, shape)
            assert torch.equal(together[40:-1], alone[begin:end]), (begin, end)


def test_the_usual_attention_is_not_so() -> None:
    """What the test above would see: a query's sums have another order in a chunk than in a step of its own."""
    torch.manual_seed(0)
    shape = AttentionShape(6, 2, 64, 0.125)
    step = make_step([300], [300], 8, CPU)
    cache = make_cache(int(step.block_tables.max()) + 1, 2, 8, 64, torch.bfloat16, torch.bfloat16, CPU)
    q = torch.randn(300, 6, 64).to(torch.bfloat16)
    chunk = paged_attention(q, step, cache, shape)
    alone = paged_attention(q[-1:], StepInputs.decode([300], 8, tables=step.block_tables), cache, shape)
    assert not torch.equal(chunk[-1:], alone)


def test_heads_that_no_vector_fits_are_refused() -> None:
    step = make_step([3], [3], 8, CPU)
    cache = make_cache(1, 1, 8, 24, torch.float32, torch.float32, CPU)
    with pytest.raises(ValueError, match="heads of 24 elements have no batch-invariant attention; multiples of 16"):
        invariant_attention(torch.randn(3, 1, 24), step, cache, AttentionShape(1, 1, 24, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_operators_have_the_same_bits_for_a_token_in_any_company(dtype: torch.dtype) -> None:
    """All but attention: `Ops.invariant` says so of them, too."""
    torch.manual_seed(0)
    ops = select_ops(CPU, dtype).invariant
    assert ops is not None
    assert ops.batch_invariant
    weight = torch.rand(K)
    x = torch.randn(70, K).to(dtype)
    counts = (2, 3, 16, 64)
    check(lambda x: ops.rms_norm(x, weight, 1e-6), x, counts)
    for multiplier, after in ((1.0, None), (0.22, weight)):
        add = partial(ops.add_rms_norm, weight=weight, eps=1e-6, after=after, multiplier=multiplier)
        check(lambda x, add=add: torch.cat(add(x, x.flip(-1)), dim=-1), x, counts)
    check(ops.silu_and_mul, x, counts)
    check(ops.gelu_tanh_and_mul, x, counts)


@pytest.mark.parametrize("half", [8, 20, 32, 64])
def test_positions_turn_by_the_same_bits_however_their_table_grows(half: int) -> None:
    spec = RopeSpec("default", 10_000.0, 2 * half, 4096, 4096)
    at_once = RopeTable(spec, 4096)
    at_once.cover(4096)
    growing = RopeTable(spec, 4096)
    for length in (1, 2, 7, 100, 333, 1030, 4001, 4096):
        growing.cover(length)
    assert torch.equal(growing.values, at_once.values)
