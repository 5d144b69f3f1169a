"""Folded scales leave the function as it was: norm -> linear, linear -> linear, biases, shared KV heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.algorithms.scale_folding import fold_scales, tie_scales
from octavo.quant.block_map import Fold
from octavo.quant.qparams import WeightError

H, HEADS, KV_HEADS, DIM = 32, 6, 2, 8
TOKENS = 50


def collect(x: Tensor) -> InputStats:
    collector = StatsCollector(x.shape[1], x.device)
    collector.add(x)
    return collector.result()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def scales_of(k: int) -> Tensor:
    return torch.exp(random(k))


def norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],)) * (weight.to(x.dtype) + offset)


def heads_of_queries(v: Tensor) -> Tensor:
    """Attention of a token to itself: each KV head's values stand once for each of its query heads. [T, K]."""
    return v.view(-1, KV_HEADS, 1, DIM).expand(-1, -1, HEADS // KV_HEADS, -1).reshape(v.shape[0], -1)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(offset: float, dtype: torch.dtype) -> None:
    """Two readers; the quotient's rounding is made good, so only the readers' own rounding is left."""
    x = random(TOKENS, H)
    tensors = {
        "norm.weight": (random(H) * 0.3 + 1 - offset).to(dtype),
        "q.weight": random(48, H, dtype=dtype),
        "k.weight": random(16, H, dtype=dtype, seed=1),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    given = dict(tensors)
    normed = norm(x, before["norm.weight"], offset)
    stats = fold_scales(tensors, Fold("qkv", "norm", "norm", offset=offset), ["q", "k"], scales_of(H), collect(normed))
    now = norm(x, tensors["norm.weight"], offset)
    unit = torch.finfo(dtype).eps
    for name in ("q.weight", "k.weight"):
        expected, got = normed @ before[name].float().T, now @ tensors[name].float().T
        # Each column rounds by half a unit of the type, and float32 sums of 32 products by some of its own.
        bound = normed.abs() @ before[name].float().abs().T * (unit / 2 + 4 * 32 * 2.0**-24)
        assert ((got - expected).abs() <= bound).all()
    fresh = collect(now)
    for name in ("moments", "absmax", "absmean"):
        truth = getattr(fresh, name)
        assert torch.allclose(getattr(stats, name), truth, rtol=1e-5, atol=1e-6 * truth.abs().max().item())
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name]), f"{name} was changed in place"
        assert tensors[name].dtype == dtype
        assert tensors[name].data_ptr() != tensor.data_ptr()


def test_a_channel_that_rounding_would_end_stays_as_it_was() -> None:
    """Gemma's norm in bf16: 1 + w of 0.0039 divided by 100 has w = -1 as the nearest number."""
    tensors = {
        "norm.weight": torch.tensor([-0.99609375, 0.5, -1.0]).bfloat16(),
        "q.weight": random(4, 3, dtype=torch.bfloat16),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    x = random(TOKENS, 3)
    fold_scales(tensors, Fold("qkv", "norm", "norm", offset=1.0), ["q"], torch.tensor([100.0, 2.0, 3.0]), collect(x))
    assert torch.equal(tensors["norm.weight"][[0, 2]], before["norm.weight"][[0, 2]])
    assert torch.equal(tensors["q.weight"][:, [0, 2]], before["q.weight"][:, [0, 2]])
    assert tensors["norm.weight"][1] == 1.5 / 2 - 1
    assert torch.equal(tensors["q.weight"][:, 1], before["q.weight"][:, 1] * 2)


@pytest.mark.parametrize("fused", [False, True])
def test_values_to_output_projection(fused: bool) -> None:
    """Query heads share KV heads; v_proj has a bias; in a fused qkv_proj only v's rows are divided."""
    x, kv_width, skipped = random(TOKENS, H), KV_HEADS * DIM, 20 if fused else 0
    tensors = {
        "v.weight": random(skipped + kv_width, H),
        "v.bias": random(skipped + kv_width),
        "o.weight": random(H, HEADS * DIM),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    rows = (skipped, skipped + kv_width) if fused else None
    fold = Fold("o", "v", "rows", rows=rows, repeats=HEADS // KV_HEADS, head_dim=DIM)

    def run(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        attended = heads_of_queries(F.linear(x, t["v.weight"], t["v.bias"])[:, skipped:])
        return attended, attended @ t["o.weight"].T

    attended, expected = run(before)
    scales = tie_scales(scales_of(HEADS * DIM), fold)
    stats = fold_scales(tensors, fold, ["o"], scales, collect(attended))
    now, got = run(tensors)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(now, attended / scales, rtol=1e-5, atol=1e-6)
    assert torch.allclose(stats.absmax, now.abs().amax(0), rtol=1e-5)
    assert torch.equal(tensors["v.weight"][:skipped], before["v.weight"][:skipped])
    assert not torch.equal(tensors["v.bias"][skipped:], before["v.bias"][skipped:])


def test_tied_scales_are_geometric_means_over_query_heads() -> None:
    fold = Fold("o", "v", "rows", repeats=HEADS // KV_HEADS, head_dim=DIM)
    scales = scales_of(HEADS * DIM)
    tied = tie_scales(scales, fold)
    for head in range(KV_HEADS):
        for i in range(DIM):
            sharing = [(head * 3 + query) * DIM + i for query in range(3)]
            expected = scales[sharing].double().prod() ** (1 / 3)
            assert tied[sharing].tolist() == pytest.approx([expected.item()] * 3, rel=1e-6)
    plain = Fold("down", "up", "rows")
    assert torch.equal(tie_scales(scales, plain), scales)


def test_scales_that_break_the_model_are_refused() -> None:
    tensors = {"v.weight": random(KV_HEADS * DIM, H), "o.weight": random(H, HEADS * DIM)}
    fold = Fold("o", "v", "rows", repeats=HEADS // KV_HEADS, head_dim=DIM)
    stats, good = collect(random(TOKENS, HEADS * DIM)), torch.ones(HEADS * DIM)
    untied = good.clone()
    untied[0] = 2
    for scales, message in (
        (untied, "differ between query heads"),
        (good * 0, "48 positive numbers"),
        (good * torch.inf, "48 positive numbers"),
        (good[1:], "48 positive numbers"),
    ):
        before = dict(tensors)
        with pytest.raises(WeightError, match=message):
            fold_scales(tensors, fold, ["o"], scales, stats)
        assert tensors == before
    wrong = Fold("o", "v", "rows", rows=(0, 8), repeats=HEADS // KV_HEADS, head_dim=DIM)
    with pytest.raises(WeightError, match="8 rows for 16 scales"):
        fold_scales(tensors, wrong, ["o"], good, stats)
