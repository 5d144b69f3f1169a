"""Rows of a KV cache with scales of their own: what they hold, and that the CPU's bodies write and read the same."""

from __future__ import annotations

import pytest
import torch
from attention_steps import make_step
from torch import Tensor

from octavo.kernels.attention import cpu, reference, rope_cpu
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.token_rows import TYPES, TokenRows, decode_rows, encode_rows, hadamard, type_of

NEW = [1, 5, 33, 1, 20]
LENGTHS = [40, 5, 50, 17, 20]
BITS = [kind.bits for kind in TYPES]


def numbers(dim: int) -> Tensor:
    """Rows [.., dim] of sizes from 1e-3 to 1e3: of both signs, of one sign, and of zeros."""
    x = torch.randn(40, 3, dim) * torch.logspace(-3, 3, 40)[:, None, None]
    x[3] = x[3].abs()
    x[4] = -x[4].abs() - 5
    x[5] = 0
    return x


def cache_of(kind: TokenRows, kv_heads: int, dim: int) -> LayerCache:
    key, value = (encode_rows(torch.randn(24, kv_heads, 16, dim) * 3, kind.bits) for _ in range(2))
    return LayerCache(key, value, torch.ones(kv_heads), torch.ones(kv_heads))


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 64, 80])
def test_a_row_is_within_half_a_step(kind: TokenRows, dim: int) -> None:
    """Of 127ths of the largest, or of 15ths of the range; the zero point's rounding costs 4 bits half a step more."""
    torch.manual_seed(0)
    x = numbers(dim)
    rows = encode_rows(x, kind.bits)
    assert rows.shape == (40, 3, kind.row_bytes(dim))
    assert type_of(rows, dim) == kind
    x64 = x.double()
    top = x64.abs().amax(-1, keepdim=True)
    extent = x64.amax(-1, keepdim=True).clamp(min=0) - x64.amin(-1, keepdim=True).clamp(max=0)
    limit = 0.5 * top / 127 if kind.bits == 8 else extent / 15
    assert ((decode_rows(rows, dim).double() - x64).abs() <= limit * (1 + 2.0**-15)).all()


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_stand_for_themselves(bits: int) -> None:
    """Numbers of the grid come back as they were."""
    codes = torch.arange(-127, 129, 2) if bits == 8 else torch.arange(16).repeat(8) - 5
    x = codes[None].float() * 0.25
    assert torch.equal(decode_rows(encode_rows(x, bits), 128), x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_never_becomes_one(bits: int, bad: float) -> None:
    x = torch.randn(3, 1, 32)
    x[1, 0, 7] = bad
    for rows in (encode_rows(x, bits), *written_by_the_kernel(x, bits)):
        finite = decode_rows(rows, 32).isfinite()
        assert finite[[0, 2]].all()
        assert not finite[1].all()


def written_by_the_kernel(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [T, H, D] as keys and as values through `rope_cpu`, without positions."""
    tokens, heads, dim = x.shape
    step = make_step([tokens], [tokens], 16, x.device)
    blocks = int(step.block_tables.max()) + 1
    stores = [torch.zeros(blocks, heads, 16, TokenRows(bits).row_bytes(dim), dtype=torch.uint8) for _ in range(2)]
    cache = LayerCache(stores[0], stores[1], torch.ones(heads), torch.ones(heads))
    qkv = torch.cat([x, x, x], dim=1).flatten(1)
    q = rope_cpu.rope_and_cache(qkv, step, cache, AttentionShape(heads, heads, dim, 1.0), None, None, None, 1e-6)
    block, offset = step.slot_mapping // 16, step.slot_mapping % 16
    if x.isfinite().all():
        assert torch.equal(q, hadamard(x) if bits == 4 else x)
    return cache.key[block, :, offset], cache.value[block, :, offset]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [32, 64, 80])
def test_the_kernel_writes_the_reference_s_bytes(dim: int, bits: int) -> None:
    torch.manual_seed(0)
    x = numbers(dim)
    keys, values = written_by_the_kernel(x, bits)
    assert torch.equal(values, encode_rows(x, bits))
    assert torch.equal(keys, encode_rows(hadamard(x) if bits == 4 else x, bits))


@pytest.mark.parametrize("dim", [24, 64, 80])
def test_the_rotation_changes_no_score(dim: int) -> None:
    """It is its own inverse, and a channel that is larger than the others becomes as large as they."""
    torch.manual_seed(0)
    x = torch.randn(7, dim)
    assert ((hadamard(hadamard(x)) - x).abs() <= 1e-6 * x.abs().amax()).all()
    x[:, 3] = 100.0
    block = dim & -dim
    assert hadamard(x).abs().amax() <= (100 + x.abs().sort(-1)[0][:, :-1].sum(-1).amax()) * block**-0.5


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (18, 5.0)])
def test_attention(kind: TokenRows, dtype: torch.dtype, window: int | None, soft_cap: float | None) -> None:
    """Decode, chunks and whole prompts, as over a cache that holds the decoded numbers in float32.

    A body may round keys, values and weights to q's type: each costs a unit of the largest score or value.
    """
    torch.manual_seed(0)
    unit = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for heads, kv_heads, dim in ((9, 3, 64), (8, 1, 80), (4, 2, 24)):
        shape = AttentionShape(heads, kv_heads, dim, dim**-0.5, window, soft_cap)
        cache = cache_of(kind, kv_heads, dim)
        key, value = (decode_rows(store, dim) for store in (cache.key, cache.value))
        wide = LayerCache(key, value, cache.key_scale, cache.value_scale)
        for new, lengths in ((NEW, LENGTHS), ([1] * 5, LENGTHS)):
            step = make_step(new, lengths, 16, cache.key.device)
            q = torch.randn(sum(new), heads, dim).to(dtype)
            truth = reference.paged_attention(q.float(), step, wide, shape)
            mass = q.float().abs().sum(-1).amax() * key.abs().amax() * shape.scale
            limit = 2 * unit * (2 + mass) * value.abs().amax()
            assert torch.equal(reference.paged_attention(q.float(), step, cache, shape), truth)
            for body in (cpu.paged_attention, *([cpu.invariant_attention] if dim % 16 == 0 else [])):
                assert ((body(q, step, cache, shape).float() - truth).abs() <= limit).all()
