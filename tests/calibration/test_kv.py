"""KV scales and what they cost, against sums over all tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from octavo.calibration.kv import SAMPLES, KVCollector, KVError, KVReport, kv_advice
from octavo.quant.scheme import KVScheme

HEADS, DIM = 3, 16


def random(tokens: int, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([0.5, 1.0, 4.0]).view(1, HEADS, 1)


def seen(scheme: KVScheme, k: Tensor, v: Tensor, batch: int = 97) -> KVReport:
    collector = KVCollector(scheme)
    for begin in range(0, k.shape[0], batch):
        collector.add(k[begin : begin + batch], v[begin : begin + batch])
    return collector.result()


def rounded(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Float64 to the nearest number of the type; e4m3 has 3 bits of fraction and a smallest step of 2^-9."""
    q = x.double() / scale
    if kind == "int8":
        return q.round().clamp(-127, 127) * scale
    step = 2.0 ** (q.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (q / step).round().mul(step).clamp(-448, 448) * scale


@pytest.mark.parametrize("kind", ["fp8_e4m3", "int8"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_noise(kind: str, per_head: bool, dtype: torch.dtype) -> None:
    k, v = random(900).to(dtype), random(900, seed=1).to(dtype)
    assert kind in ("fp8_e4m3", "int8")
    result = seen(KVScheme(kind, kind, per_head), k, v)  # type: ignore[arg-type]
    assert set(result.scales()) == {"k_scale", "v_scale"}
    for side, x, centered in ((result.key, k, True), (result.value, v, False)):
        amax = x.float().abs().amax((0, 2))
        assert side.amax == amax.tolist()
        expected = (amax if per_head else amax.max().view(1)) / (448 if kind == "fp8_e4m3" else 127)
        assert side.scale is not None
        assert side.scale.shape == ((HEADS, 1, 1) if per_head else (1,))
        assert torch.equal(side.scale.flatten(), expected)
        assert side.clipped == 0
        exact = x.double()
        noise = (rounded(exact, expected.double().view(1, -1, 1), kind) - exact).square().sum((0, 2))
        signal = (exact - exact.mean(0) if centered else exact).square().sum((0, 2))
        truth = 10 * math.log10((signal / noise).min().item())
        # Ties that fall otherwise after a float32 division are rare; they weigh the same, so nothing else differs.
        assert side.snr_db == pytest.approx(truth, abs=0.01)


def test_long_text_is_sampled_evenly() -> None:
    """The noise is of a sample of tokens from all of the text; largest values are of all of it."""
    k = random(5 * SAMPLES)
    k[-1, 0, 0] = 200
    result = seen(KVScheme("fp8_e4m3", "fp8_e4m3"), k, random(5 * SAMPLES, seed=1))
    assert result.key.amax[0] == 200
    assert result.key.snr_db == pytest.approx(seen(KVScheme("fp8_e4m3", "fp8_e4m3"), k[:SAMPLES], k).key.snr_db, abs=1)


def test_the_share_beyond_the_range() -> None:
    k = random(100)
    k[:50, 0, 3] = 500
    assert seen(KVScheme("fp8_e4m3", "fp8_e4m3"), k, random(100)).key.beyond == 50 / k.numel()
    assert seen(KVScheme("bf16", "fp8_e4m3"), k, random(100)).key.beyond == 50 / k.numel()


def test_a_side_that_stays_wide_has_no_scale() -> None:
    result = seen(KVScheme("bf16", "fp8_e4m3"), random(10), random(10))
    assert set(result.scales()) == {"v_scale"}
    assert result.key.scale is None


@pytest.mark.parametrize("factor", [1.0, 1.003, 0.999])
def test_no_scale_is_one(factor: float) -> None:
    """Not even after it is rounded to bf16: other engines take 1 for 'never measured'."""
    k = random(50).clamp(-5, 5)
    k[0, 0, 0] = 448 * factor
    scale = seen(KVScheme("fp8_e4m3", "fp8_e4m3"), k, random(50)).key.scale
    assert scale is not None
    assert 448 * scale.bfloat16().item() >= 448 * factor
    assert scale.bfloat16().item() == 1 + 2**-7


def test_what_has_no_scale_is_refused() -> None:
    scheme = KVScheme("fp8_e4m3", "fp8_e4m3", per_head=True)
    with pytest.raises(KVError, match="no keys were seen"):
        KVCollector(scheme).result()
    k, v = random(10), random(10)
    v[:, 1] = 0
    with pytest.raises(KVError, match="values of KV head 1 are all zero"):
        seen(scheme, k, v)
    assert seen(KVScheme("fp8_e4m3", "fp8_e4m3"), k, v).value.scale is not None
    k[3, 2, 1] = torch.nan
    with pytest.raises(KVError, match="keys hold NaN or infinity"):
        seen(scheme, k, v)


def test_keys_with_a_large_bias_are_found() -> None:
    """As Qwen2's: some channels are hundreds in every token, and their rounding drowns what tells tokens apart."""
    scheme = KVScheme("fp8_e4m3", "fp8_e4m3")
    k, v = random(500), random(500, seed=1)
    healthy = seen(scheme, k, v)
    assert kv_advice([healthy, healthy]) is None
    biased = k + torch.where(torch.arange(DIM) % 5 == 0, 300.0, 0.0)
    ill = seen(scheme, biased, v)
    advice = kv_advice([healthy, ill])
    assert advice is not None
    assert advice.endswith("--kv-cache-scheme k=bf16,v=fp8")
    assert "layer 1" in advice
    assert kv_advice([seen(KVScheme("bf16", "fp8_e4m3"), biased, v)]) is None
