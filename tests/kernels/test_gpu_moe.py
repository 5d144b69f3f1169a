"""The kernels of a mixture against the reference: routing, sorting, the grouped GEMMs, and the whole way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from chosen_experts import routed
from slow_cases import slow, slow_if
from torch import Tensor

from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.gemm.gpu import packing
from octavo.kernels.gemm.gpu.arguments import Pairs
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed, gemm_swap_ab
from octavo.kernels.int4 import reference as int4
from octavo.kernels.int8.gpu.linear import MAX_COLUMNS
from octavo.kernels.moe import reference
from octavo.kernels.moe.gpu import fused, route
from octavo.kernels.moe.gpu.permute_columns import permute_columns
from octavo.kernels.moe.gpu.shared_expert_activation import shared_expert_activation
from octavo.kernels.moe.gpu.static_quantize import static_quantize
from octavo.kernels.norm.gpu.activation import silu_and_mul
from octavo.kernels.quantized_activation import QuantizedActivation


def random(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


@pytest.mark.parametrize("shape", [(1, 8, 2), (17, 128, 8), (5, 60, 4), (70, 5, 3), (3, 256, 8), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_routing(shape: tuple[int, int, int], normalize: bool, device: torch.device) -> None:
    num_tokens, num_experts, top_k = shape
    logits = random(num_tokens, num_experts, seed=1, device=device)
    chosen = torch.full((num_tokens, top_k), -1, dtype=torch.int32, device=device)
    weights = poisoned(num_tokens, top_k, dtype=torch.float32, device=device)
    route.route(logits, chosen, weights, normalize=normalize)()
    expected, shares = reference.route(
        logits, reference.Router(torch.eye(num_experts, device=device), reference.Routing(top_k, normalize))
    )
    assert torch.equal(chosen.long(), expected)
    # exp's error of some 2^-21 at the worst, in a sum and a numerator, then two divisions
    torch.testing.assert_close(weights, shares, rtol=2**-19, atol=0)


@pytest.mark.parametrize("shape", [(70, 5, 3, 2), (3, 60, 4, 4), (2, 8, 1, 1)], ids=str)
def test_routing_to_slices_of_a_shared_expert(shape: tuple[int, int, int, int], device: torch.device) -> None:
    """Weighted by the sigmoid of the logit behind the experts', large or small; the others as without it."""
    num_tokens, num_experts, top_k, shared = shape
    logits = random(num_tokens, num_experts + 1, seed=1, device=device)
    logits[:2, -1] = torch.tensor([90.0, -80.0])
    chosen = torch.full((num_tokens, top_k + shared), -1, dtype=torch.int32, device=device)
    weights = poisoned(num_tokens, top_k + shared, dtype=torch.float32, device=device)
    route.route(logits, chosen, weights, normalize=True, shared=shared)()
    alone, shares = torch.zeros_like(chosen[:, :top_k]), torch.zeros_like(weights[:, :top_k])
    route.route(logits[:, :-1].contiguous(), alone, shares, normalize=True)()
    assert torch.equal(chosen[:, :top_k], alone)
    assert torch.equal(weights[:, :top_k], shares)
    assert chosen[:, top_k:].tolist() == [list(range(num_experts, num_experts + shared))] * num_tokens
    gate = logits[:, -1:].double().sigmoid().expand(-1, shared)
    off = 2**-21 + float(logits[:, -1].abs().max()) * 2**-23 + 2**-22  # exp, its argument, a sum and a reciprocal
    torch.testing.assert_close(weights[:, top_k:].double(), gate, rtol=off, atol=0)


def test_of_equal_experts_the_first_are_chosen(device: torch.device) -> None:
    logits = torch.zeros(2, 6, device=device)
    logits[1, 4] = 1.0
    chosen, weights = torch.zeros(2, 3, dtype=torch.int32, device=device), torch.zeros(2, 3, device=device)
    route.route(logits, chosen, weights, normalize=True)()
    assert chosen.tolist() == [[0, 1, 2], [4, 0, 1]]
    for nans in (1, 6):
        logits[1, :nans] = torch.nan
        route.route(logits, chosen, weights, normalize=True)()
        assert not weights[0].isnan().any()
        assert weights[1].isnan().all()
        assert chosen.tolist() == [[0, 1, 2]] * 2  # whom a NaN has chosen are different, too


@pytest.mark.parametrize("shape", [(1, 8, 2), (9, 4, 3), (5, 40, 8), (300, 7, 8)], ids=str)
@pytest.mark.parametrize("block_m", [16, 64])
def test_pairs_are_sorted_by_expert(shape: tuple[int, int, int], block_m: int, device: torch.device) -> None:
    num_tokens, num_experts, top_k = shape
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randint(0, max(num_experts - 1, 1), (num_tokens, top_k), generator=generator).int().to(device)
    pairs = route.unaligned(chosen.numel(), num_experts, block_m, device)
    pairs.order.fill_(-7)
    pairs.tile_expert.fill_(-7)
    route.align(chosen, num_experts, pairs)()
    of_tile = pairs.order[:-1].view(-1, block_m).tolist()
    found: dict[int, list[int]] = {}
    for expert, rows in zip(pairs.tile_expert.tolist(), of_tile, strict=True):
        if expert != -1:
            found.setdefault(expert, []).extend(rows)
    flat = chosen.flatten()
    for expert in range(num_experts):
        expected = (flat == expert).nonzero().flatten().tolist()
        assert found.pop(expert, []) == expected + [len(flat)] * (-len(expected) % block_m)
    assert not found


def pack(
    bits: int, codes: Tensor, scale: Tensor, zero_point: Tensor | None, groups: int | Tensor, *, fp8: bool = False
) -> packing.PackedWords:
    """Experts [E, N, K], each as a layer would be packed, stacked."""
    zeros = [None] * len(codes) if zero_point is None else zero_point
    each = [groups] * len(codes) if isinstance(groups, int) else groups
    parts = zip(codes, scale, zeros, each, strict=True)
    return packing.stack([packing.pack(*of, bits=bits) for of in parts], fp8=fp8)


def sorted_pairs(num_tokens: int, top_k: int, num_experts: int, block_m: int, device: torch.device):  # type: ignore[no-untyped-def]
    """Pairs of distinct experts of which the last has no token, and the experts [T, top_k]."""
    shares = torch.rand(num_tokens, num_experts - 1, generator=torch.Generator().manual_seed(3))
    chosen = shares.topk(top_k, dim=-1).indices.int().to(device)
    pairs = route.unaligned(chosen.numel(), num_experts, block_m, device)
    route.align(chosen, num_experts, pairs)()
    return pairs, chosen


def by_pairs(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Each pair's token [T * top_k, K] times its expert's weight [E, N, K], in float64."""
    return torch.einsum("pk,pnk->pn", x.double(), weight.double()[chosen.flatten().long()])


def loose(k: int, kind: str, device: torch.device) -> float:
    """Of the sum of their sizes, what k exact products are off by in float32 in any order, with three factors.

    A GPU's e4m3 sums keep 14 bits of each BLOCK_K columns. Those of int8 are exact until they are float32.
    """
    if kind == "int8":
        return 5 * 2**-24
    return (k + 4) * 2**-24 + (2**-12 if "fp8" in kind and device.type == "cuda" else 0)


# Tokens, top_k, experts, N, K: an expert with one token, with a few and a short last group, with a tile and one more.
SHAPES = [(1, 2, 4, 200, 256), (9, 3, 5, 72, 160), (17, 1, 2, 72, 128)]
TILES = [(16, 64, 4), (64, 128, 4)]  # both ways round


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("block_m", "block_n", "warps"), TILES)
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8", "fp8 blocks", "fp8 rows of blocks", "int8"])
def test_grouped_gemm(
    shape: tuple[int, int, int, int, int], block_m: int, block_n: int, warps: int, kind: str, device: torch.device
) -> None:
    num_tokens, top_k, num_experts, n, k = shape
    pairs, chosen = sorted_pairs(num_tokens, top_k, num_experts, block_m, device)
    x, w = random(num_tokens, k, seed=4, device=device), random(num_experts, n, k, seed=5, device=device)
    w[-1] = torch.nan  # nobody's
    router = random(num_tokens, top_k, seed=6, device=device)
    scales: dict[str, Tensor] = {}
    if kind.startswith("fp8") or kind == "int8":
        x, w = ((t.clamp(-3, 3) * 100).to(torch.float8_e4m3fn) for t in (x, w))
        if kind == "int8":
            x, w = ((t.float().nan_to_num(1.0) * 0.42).round().to(torch.int8) for t in (x, w))
        blocks, rows = "blocks" in kind, (-(-n // 128), -(-k // 128)) if kind == "fp8 blocks" else (n, -(-k // 128))
        x_scale = random(num_tokens, -(-k // 128) if blocks else 1, seed=7, device=device).exp()
        w_scale = random(num_experts, *(rows if blocks else (n,)), seed=8, device=device).exp() / 1e4
        w_scale[-1] = torch.nan
        scales = {"x_scale": x_scale, "w_scale": w_scale}
        wide = x_scale.repeat_interleave(128, 1)[:, :k] if blocks else x_scale
        tall = w_scale.repeat_interleave(128, 2) if blocks else w_scale[..., None]
        tall = tall.repeat_interleave(128, 1) if kind == "fp8 blocks" else tall
        true_x, true_w = x.double() * wide, w.double() * tall[:, :n, :k]
    else:
        x, w = (t.to({"bf16": torch.bfloat16, "fp16": torch.float16}[kind]) for t in (x, w))
        true_x, true_w = x, w
    repeated = true_x.repeat_interleave(top_k, 0)
    for divisor, rows_of_x in ((top_k, x), (1, x.repeat_interleave(top_k, 0))):
        out = poisoned(num_tokens * top_k, n, dtype=torch.float32, device=device)
        more = dict(scales)
        if scales and divisor == 1:
            more["x_scale"] = scales["x_scale"].repeat_interleave(top_k, 0)
        x_scale, w_scale = more.get("x_scale"), more.get("w_scale")
        those = Pairs(pairs, divisor, router if divisor == 1 else None)
        gemm_swap_ab(
            rows_of_x, w, x_scale, w_scale, out, pairs=those, blocks="blocks" in kind, block_n=block_n, group_m=8,
            num_warps=warps,
        )()  # fmt: skip
        expected = by_pairs(repeated, true_w, chosen)
        magnitude = by_pairs(repeated.abs(), true_w.abs(), chosen)
        if divisor == 1:
            expected, magnitude = (
                t * f.double().flatten()[:, None] for t, f in ((expected, router), (magnitude, router.abs()))
            )
        assert bool(((out.double() - expected).abs() <= magnitude * loose(k, kind, device)).all())


@pytest.mark.parametrize(
    ("group_size", "num_tokens", "block_m"),
    [(32, 9, 16), (64, 9, 16), (128, 9, 16), (256, 9, 16), (1000, 9, 16), (1000, 1, 16), (128, 17, 16), (32, 17, 64)],
)
@pytest.mark.parametrize(("symmetric", "fp8"), [(True, False), (False, True), slow(True, True), slow(False, False)])
def test_grouped_int4_gemm(
    group_size: int, num_tokens: int, block_m: int, symmetric: bool, fp8: bool, device: torch.device
) -> None:
    n, k = 72, 392  # the last group is short, the tile too
    top_k, num_experts = (1, 2) if num_tokens == 17 else (2, 4)  # all tokens to one expert, a tile's rows and one more
    dtype = torch.float16 if group_size == 64 else torch.bfloat16
    pairs, chosen = sorted_pairs(num_tokens, top_k, num_experts, block_m, device)
    generator = torch.Generator().manual_seed(9)
    codes = torch.randint(-8, 8, (num_experts, n, k), generator=generator).to(torch.int8).to(device)
    groups = -(-k // group_size)
    scale = random(num_experts, n, groups, seed=10, device=device).exp()
    zero = torch.randint(-8, 9, (num_experts, n, groups), generator=generator).to(torch.int8).to(device)
    packed = pack(4, codes, scale, None if symmetric else zero, group_size)
    of_column = torch.arange(k, device=device) // group_size
    weight = torch.stack(
        [int4.dequantize(codes[e], scale[e], None if symmetric else zero[e], of_column) for e in range(num_experts)]
    )
    assert torch.equal(packed.unpack(), weight)
    x, router = (
        random(num_tokens, k, seed=11, device=device).to(dtype),
        random(num_tokens, top_k, seed=12, device=device),
    )
    truth, x_scale = x.double(), None
    if fp8:
        x_scale = random(num_tokens, 1, seed=26, device=device).exp()
        x = (x.float() * 50).to(torch.float8_e4m3fn)
        truth = x.double() * x_scale
    repeated = truth.repeat_interleave(top_k, 0)
    out = poisoned(num_tokens * top_k, n, dtype=torch.float32, device=device)
    gemm_packed(x, packed, out, x_scale, pairs=Pairs(pairs, top_k, router), group_m=8)()
    factor = router.double().flatten()[:, None]
    expected = by_pairs(repeated, weight, chosen) * factor
    # Zero points are subtracted from codes, not from sums, so nothing cancels. Sums of k exact products in float32, a
    # scale, a sum of groups, a factor.
    magnitude = by_pairs(repeated.abs(), weight.abs(), chosen) * factor.abs()
    limit = magnitude * loose(k, "fp8" if fp8 else "int4", device)
    assert bool(((out.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group_size", "num_tokens", "block_m"), [(32, 9, 16), (96, 9, 16), (256, 9, 16), (1000, 1, 16), (128, 17, 64)]
)
def test_grouped_gemm_of_int8_weights(
    group_size: int, num_tokens: int, block_m: int, symmetric: bool, device: torch.device
) -> None:
    """As of 4 bits; some codes are at the ends, and zero points so far away that a difference needs 9 bits."""
    n, k = 72, 392
    top_k, num_experts = (1, 2) if num_tokens == 17 else (2, 4)
    dtype = torch.float16 if group_size == 96 else torch.bfloat16
    pairs, chosen = sorted_pairs(num_tokens, top_k, num_experts, block_m, device)
    generator = torch.Generator().manual_seed(27)
    codes = torch.randint(-128, 128, (num_experts, n, k), generator=generator).to(torch.int8).to(device)
    scale = random(num_experts, n, -(-k // group_size), seed=28, device=device).exp()
    zero = torch.randint(-128, 128, scale.shape, generator=generator).to(torch.int8).to(device)
    codes[0, 0, :2], zero[0, 0, 0] = torch.tensor([-128, 127], dtype=torch.int8), 127
    packed = pack(8, codes, scale, None if symmetric else zero, group_size)
    of_column = torch.arange(k, device=device) // group_size
    rows = [int4.dequantize(codes[e], scale[e], None if symmetric else zero[e], of_column) for e in range(num_experts)]
    weight = torch.stack(rows)
    assert torch.equal(packed.unpack(), weight)
    x = random(num_tokens, k, seed=29, device=device).to(dtype)
    router = random(num_tokens, top_k, seed=30, device=device)
    out = poisoned(num_tokens * top_k, n, dtype=torch.float32, device=device)
    gemm_packed(x, packed, out, pairs=Pairs(pairs, top_k, router), group_m=8)()
    repeated, factor = x.repeat_interleave(top_k, 0), router.double().flatten()[:, None]
    magnitude = by_pairs(repeated.abs(), weight.abs(), chosen) * factor.abs()
    off = (out.double() - by_pairs(repeated, weight, chosen) * factor).abs()
    assert bool((off <= magnitude * loose(k, "w8a16", device)).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "k"), [(32, 200), (64, 192), (128, 300), (300, 300)])
def test_experts_with_act_order_are_the_experts(group_size: int, k: int, bits: int) -> None:
    """Each in an order of its own, the last groups short; what is packed unpacks to it."""
    num_experts, n, groups = 3, 8, -(-k // group_size)
    generator = torch.Generator().manual_seed(21)
    codes = torch.randint(-8, 8, (num_experts, n, k), generator=generator).to(torch.int8)
    scale = torch.rand(num_experts, n, groups, generator=generator) + 0.5
    zero = torch.randint(-8, 8, (num_experts, n, groups), generator=generator).to(torch.int8)
    g_idx = torch.stack([torch.randperm(k, generator=generator) // group_size for _ in range(num_experts)])
    for zeros in (zero, None):
        packed = pack(bits, codes, scale, zeros, g_idx)
        assert (packed.order is None) == (groups == 1)
        for e, own in enumerate(packed.unpack()):
            expected = int4.dequantize(codes[e], scale[e], None if zeros is None else zeros[e], g_idx[e])
            assert torch.equal(own, expected)
    assert pack(bits, codes, scale, None, g_idx.sort(dim=1)[0]).order is None
    if groups > 1:
        g_idx[1, 0] = (g_idx[1, 0] + 1) % groups
        with pytest.raises(ValueError, match=f"haven't {group_size} columns" if bits == 4 else "multiples of 32"):
            pack(bits, codes, scale, None, g_idx)


@pytest.mark.parametrize("shape", [(1, 2, 4, 200), (5, 3, 6, 4100)], ids=str)
def test_columns_of_pairs(shape: tuple[int, int, int, int], device: torch.device) -> None:
    num_tokens, each, num_experts, columns = shape
    generator = torch.Generator().manual_seed(22)
    x = random(num_tokens, columns, seed=23, device=device).bfloat16()
    order = torch.stack([torch.randperm(columns, generator=generator) for _ in range(num_experts)]).int().to(device)
    chosen = torch.randint(0, num_experts, (num_tokens, each), generator=generator).int().to(device)
    out = poisoned(num_tokens * each, columns, dtype=torch.bfloat16, device=device)
    permute_columns(x, order, chosen, out)()
    expected = [x[t][order[e].long()] for t, experts_of in enumerate(chosen.tolist()) for e in experts_of]
    assert torch.equal(out, torch.stack(expected))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 4, 200), (5, 3, 6, 1100)], ids=str)
def test_pairs_are_rounded_by_their_experts_scales(
    shape: tuple[int, int, int, int], gated: bool, device: torch.device
) -> None:
    """Bit for bit what `quantize` and `silu_and_mul` make of a row with that scale."""
    num_tokens, each, num_experts, width = shape
    pairs = num_tokens * each
    x = random(pairs if gated else num_tokens, width * (1 + gated), seed=24, device=device).bfloat16()
    x[-1, 3] = torch.inf
    stored = (torch.rand(num_experts, generator=torch.Generator().manual_seed(25)) / 200).to(device)
    chosen = torch.arange(pairs, device=device).flip(0).int().reshape(num_tokens, each) % num_experts
    codes = torch.full((pairs, width), 99, device=device).to(torch.float8_e4m3fn)
    scale = poisoned(pairs, 1, dtype=torch.float32, device=device)
    static_quantize(x, stored, chosen, codes, scale, gated=gated)()
    for pair, expert in enumerate(chosen.flatten().tolist()):
        out, step = torch.empty_like(codes[:1]), poisoned(1, 1, dtype=torch.float32, device=device)
        row, own = x[pair if gated else pair // each][None], stored[expert : expert + 1].clone()
        (silu_and_mul if gated else quantize)(row, out, scale=step, static_scale=own)()
        assert torch.equal(codes[pair].view(torch.uint8), out[0].view(torch.uint8))
        assert scale[pair].isnan() == (pair == pairs - 1 or (not gated and pair // each == num_tokens - 1))
        assert scale[pair].isnan() or scale[pair] == stored[expert]


def test_groups_that_cross_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"haven't 32 columns"):
        pack(4, torch.zeros(1, 8, 96, dtype=torch.int8), torch.ones(1, 8, 2), None, 48)


def experts(
    kind: str, num_experts: int, n: int, k: int, seed: int, device: torch.device
) -> tuple[fused.Weights, Tensor]:
    """Weights [E, N, K] in a form, and what they are in float64."""
    w = random(num_experts, n, k, seed=seed, device=device) / k**0.5
    if kind == "w8a16":
        scale = w.view(num_experts, n, -1, 64).abs().amax(-1) / 127
        bytes_ = pack(8, (w / scale.repeat_interleave(64, 2)).round().to(torch.int8), scale, None, 64)
        return bytes_, bytes_.unpack().double()
    if kind == "w8a16 of e4m3":
        scale = w.abs().amax(-1, keepdim=True) / 448
        codes = (w / scale).to(torch.float8_e4m3fn)
        return pack(8, codes, scale, None, k), codes.double() * scale.double()
    if kind.startswith("int4"):
        scale = w.view(num_experts, n, -1, 64).abs().amax(-1) / 7
        groups = None
        if kind.endswith("act-order"):
            shares = torch.rand(num_experts, k, generator=torch.Generator().manual_seed(seed))
            groups = shares.argsort(1).to(device) // 64
        codes = (w / scale.repeat_interleave(64, 2)).round().to(torch.int8)
        packed = pack(4, codes, scale, None, 64 if groups is None else groups, fp8=kind == "int4 fp8")
        return packed, packed.unpack().double()
    if kind == "bf16":
        return fused.Experts(w.bfloat16()), w.bfloat16().double()
    if kind == "int8":
        scale = w.abs().amax(-1) / 127
        codes = (w / scale[..., None]).round().to(torch.int8)
        return fused.Experts(codes, scale), codes.double() * scale[..., None]
    if kind in ("fp8", "fp8 static"):
        scale = w.abs().amax(-1) / 448
        codes = (w / scale[..., None]).to(torch.float8_e4m3fn)
        stored = None  # for what they read, of which some is larger
        if kind == "fp8 static":
            stored = (1 + torch.rand(num_experts, generator=torch.Generator().manual_seed(seed))).to(device) / 448
        return fused.Experts(codes, scale, stored), codes.double() * scale[..., None]
    tiles = F.pad(w, (0, -k % 128, 0, -n % 128)).unfold(1, 128, 128).unfold(2, 128, 128)
    scale = tiles.abs().amax((-1, -2)) / 448
    wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :n, :k]
    codes = (w / wide).to(torch.float8_e4m3fn)
    return fused.Experts(codes, scale), codes.double() * wide


def span(*candidates: Tensor) -> Tensor:
    """The least and the most of them [2, ...], between which a kernel's number lies."""
    return torch.stack(torch.stack(candidates).aminmax(dim=0))


def times(a: Tensor, b: Tensor | tuple[float, float]) -> Tensor:
    """What lies between a's ends times what lies between b's."""
    return span(*(p * q for p in a for q in b))


def product(x: Tensor, weight: Tensor, chosen: Tensor, share: float) -> Tensor:
    """`by_pairs` of what lies between x's ends, computed with an error of that share of the sum of sizes."""
    middle, half = (x[1] + x[0]) / 2, (x[1] - x[0]) / 2
    off = by_pairs(half + share * (middle.abs() + half), weight.abs(), chosen)
    return by_pairs(middle, weight, chosen) + torch.stack([-off, off])


def coded_by(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 codes of rows times the scales that they are to have."""
    step = scale.double()[:, None]
    codes = span(*(v / step for v in x)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * step


def coded(x: Tensor, group_size: int, kind: str) -> Tensor:
    """Codes times their scale, the largest size / 448 or, of int8, / 127.5 in group_size columns between x's ends."""
    most = 127.5 if kind == "int8" else 448
    groups = F.pad(x, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    sizes = torch.stack([torch.maximum(groups[0], -groups[1]).clamp_min(0), torch.maximum(-groups[0], groups[1])])
    scale = (sizes.amax(-1, keepdim=True) / most).float().double()
    codes = span(*(v / s for v in groups for s in scale)).float()
    codes = codes.round().clamp(-128, 127) if kind == "int8" else codes.clamp(-448, 448).to(torch.float8_e4m3fn)
    return times(codes.double(), scale).flatten(-2)[..., : x.shape[-1]]


def silu(x: Tensor) -> Tensor:
    """Falls to its least value, -0.27846 at -1.27846, and rises from there."""
    valley = x.new_tensor(-1.2784645427610738)
    return span(*F.silu(x), F.silu(valley.clamp(*x)))


KINDS = (
    "bf16", "fp8", "fp8 static", "fp8 blocks", "int8", "int4", "int4, act-order", "int4 fp8", "w8a16", "w8a16 of e4m3",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "num_tokens", "shared"),
    slow_if(
        ((kind, *size) for kind in KINDS for size in [(0, 2), (1, 0), (1, 2), (7, 0), (5, 2)]),
        # each storage with a shared expert and without; all sizes with rounded inputs
        lambda kind, *size: kind != "fp8" and size not in [(1, 0), (5, 2)],
    ),
)
def test_the_whole_way(kind: str, num_tokens: int, shared: int, device: torch.device) -> None:
    """Between two ends, which part by what a kernel may be off and are rounded where it rounds.

    Rounding swaps no two numbers, so that what lay between the ends still does. Mostly they meet again there; where
    the truth is next to the middle of two codes they come to be a whole step apart.
    """
    num_experts, hidden, width, top_k = 6, 192, 128, 2
    gate_up, true_gate_up = experts(kind, num_experts + shared, 2 * width, hidden, 13, device)
    down, true_down = experts(kind.split(",")[0], num_experts + shared, hidden, width, 14, device)
    x = random(num_tokens, hidden, seed=15, device=device).bfloat16()
    router = (random(num_experts + min(shared, 1), hidden, seed=16, device=device) / hidden**0.5).bfloat16()
    out = fused.fused_moe(x, router, top_k, gate_up, down, normalize=True, shared=shared)
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    if num_tokens == 0:
        return

    def rounded(t: Tensor) -> Tensor:
        if kind in fused.CODES:
            return coded(t, 128 if kind == "fp8 blocks" else t.shape[-1], kind)
        return t.bfloat16().double()

    def rounded_acts(t: Tensor) -> Tensor:
        """Of [2, T * each, I]: the slices of a token's shared expert are one row."""
        routed, slices = t.unflatten(1, (num_tokens, -1)).split([top_k, shared], 2)
        whole = rounded(slices.flatten(2)).view(slices.shape) if shared else slices
        return torch.cat([rounded(routed), whole], 2).flatten(1, 2)

    chosen, weights, share = routed(x, router[:num_experts], top_k, normalize=True)
    if shared:
        behind = torch.arange(num_experts, num_experts + shared, device=device).expand(num_tokens, -1)
        gate = (x.double() @ router[-1].double()).sigmoid()[:, None].expand(-1, shared)
        chosen, weights = torch.cat([chosen, behind], 1), torch.cat([weights, gate], 1)
    each = top_k + shared
    tokens = x.double().expand(2, -1, -1).repeat_interleave(each, 1)
    tokens = coded_by(tokens, gate_up.input_scale[chosen.flatten()]) if kind == "fp8 static" else rounded(tokens)
    between = product(tokens, true_gate_up, chosen, loose(hidden, kind, device)).bfloat16().double()
    gate, up = between.chunk(2, dim=-1)
    exp = 16 * 2**-24  # as test_gpu_activation.py counts
    acted = times(times(silu(gate), up), (1 - exp, 1 + exp))
    acted = coded_by(acted, down.input_scale[chosen.flatten()]) if kind == "fp8 static" else rounded_acts(acted)
    rows = product(acted, true_down, chosen, loose(width, kind, device)) * weights.flatten()[:, None]
    rows = times(rows, (1 - share, 1 + share)).bfloat16()
    least, most = sum(rows.float().unflatten(1, (-1, each)).unbind(2), torch.zeros((), device=device)).bfloat16()
    assert bool(((least <= out) & (out <= most)).all())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 4, 176), (3, 2, 1, 40), (2, 1, 3, 1408)], ids=str)
def test_slices_are_rounded_as_the_row_that_they_are(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Bit for bit what `silu_and_mul` makes of them side by side, and of the other rows; a NaN is its whole row's."""
    num_tokens, top_k, shared, width = shape
    x = random(num_tokens, top_k + shared, 2 * width, seed=20, device=device).bfloat16() * 3
    x[-1, -1, 7] = torch.nan
    codes = torch.full((num_tokens, top_k + shared, width), 99, device=device).to(dtype)
    scale = poisoned(num_tokens, top_k + shared, dtype=torch.float32, device=device)
    shared_expert_activation(x.flatten(0, 1), codes.flatten(0, 1), scale.view(-1, 1), top_k, shared)()
    gate, up = x[:, top_k:].chunk(2, dim=2)
    for rows, got, of_rows in (
        (x[:, :top_k].flatten(0, 1), codes[:, :top_k].flatten(0, 1), scale[:, :top_k].reshape(-1, 1)),
        (torch.cat([gate.flatten(1), up.flatten(1)], 1), codes[:, top_k:].flatten(1), scale[:, top_k:]),
    ):
        out, step = torch.empty_like(got), poisoned(len(got), 1, dtype=torch.float32, device=device)
        silu_and_mul(rows.contiguous(), out, scale=step)()
        assert torch.equal(of_rows.isnan(), step.isnan().expand_as(of_rows))
        real = ~step.isnan().flatten()
        assert torch.equal(of_rows[real], step[real].expand_as(of_rows[real]))
        assert torch.equal(got[real].view(torch.uint8), out[real].view(torch.uint8))
    assert scale[-1, top_k:].isnan().all()


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    bf16, _ = experts("bf16", 2, 64, 32, 17, device)
    other, _ = experts("fp8", 2, 32, 32, 18, device)
    x = torch.ones(1, 32, device=device).bfloat16()
    with pytest.raises(ValueError, match="gate_up bf16"):
        fused.launches(x, x.expand(2, 32), 1, bf16, other, x, normalize=True)
    packed, moved = (experts(kind, 2, n, 128, 19, device)[0] for kind, n in (("int4", 256), ("int4, act-order", 128)))
    x = torch.ones(1, 128, device=device).bfloat16()
    rounded = QuantizedActivation(x.to(torch.float8_e4m3fn), torch.ones(1, 1, device=device), x)
    down = experts("int4", 2, 128, 128, 19, device)[0]
    with pytest.raises(ValueError, match="made for other experts"):
        fused.launches(rounded, x.expand(2, 128).contiguous(), 1, packed, down, x, normalize=True)
    codes = torch.ones(2, 64, 32, device=device).to(torch.float8_e4m3fn)
    scale, stored = torch.ones(2, 64, device=device), torch.ones(2, device=device)
    static, x32 = fused.Experts(codes, scale, stored), torch.ones(1, 32, device=device).bfloat16()
    blocks = fused.Experts(codes, scale[:, :1, None].contiguous(), stored)
    for gate_up, last in ((static, other), (blocks, fused.Experts(codes[:, :32], scale[:, :1, None], stored))):
        with pytest.raises(ValueError, match="input_scale both"):
            fused.launches(x32, x32.expand(2, 32), 1, gate_up, last, x32, normalize=True)
    with pytest.raises(ValueError, match=r"3 rows .* 2 experts and 2 slices"):
        shared_expert_activation(torch.ones(3, 8), codes[0, :3, :4].contiguous(), torch.ones(3, 1), 2, 2)
    with pytest.raises(ValueError, match=r"int8: float8_e4m3fn works"):
        static_quantize(x32, stored, torch.zeros(1, 1).int(), torch.zeros(1, 32).to(torch.int8), torch.ones(1, 1))
    wide, one = torch.zeros(1, 1, MAX_COLUMNS + 1, dtype=torch.int8), torch.ones(1, 1)
    pairs = route.unaligned(1, 1, 16, "cpu")
    with pytest.raises(ValueError, match=f"holds {MAX_COLUMNS} columns"):
        gemm_swap_ab(wide[0], wide, one, one, one, pairs=Pairs(pairs, 1))
    with pytest.raises(ValueError, match="down has act-order"):
        fused.launches(x, x.expand(2, 128), 1, packed, moved, x, normalize=True)
