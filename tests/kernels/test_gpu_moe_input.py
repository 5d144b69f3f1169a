"""What a mixture's experts read, made by the norm before the router, where all of them take it alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.gemm.gpu.packing import pack, stack
from octavo.kernels.launching.launch import cdiv
from octavo.kernels.moe.gpu import fused
from octavo.kernels.quantized_activation import QuantizedActivation

EXPERTS, HIDDEN, WIDTH, TOP_K = 4, 192, 64, 2


def integers(kind: str, n: int, k: int, g_idx: Tensor | None, device: torch.device) -> fused.Weights:
    """Weights [EXPERTS, N, K] in groups of 32."""
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(-8, 8, (EXPERTS, n, k), generator=generator).to(torch.int8).to(device)
    scale = (torch.rand(EXPERTS, n, cdiv(k, 32), generator=generator) / k**0.5).to(device)
    groups = [32] * EXPERTS if g_idx is None else g_idx
    parts = zip(codes, scale, groups, strict=True)
    layers = [pack(c, s, None, of, bits=8 if kind == "w8a16" else 4) for c, s, of in parts]
    return stack(layers, fp8=kind == "int4 fp8")


def floats(n: int, k: int, stored: Tensor) -> fused.Experts:
    """Weights [EXPERTS, N, K] in e4m3, whose inputs have stored scales."""
    generator = torch.Generator().manual_seed(n)
    codes = torch.randn(EXPERTS, n, k, generator=generator).to(torch.float8_e4m3fn).to(stored.device)
    return fused.Experts(codes, torch.full((EXPERTS, n), k**-0.5, device=stored.device), stored)


def output(
    x: Tensor | QuantizedActivation, gate_up: fused.Weights, down: fused.Weights, device: torch.device
) -> Tensor:
    router = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    return fused.fused_moe(x, router, TOP_K, gate_up, down, normalize=True)


def hidden(device: torch.device) -> Tensor:
    return torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)


@pytest.mark.parametrize("kind", ["int4", "int4 fp8", "w8a16"])
def test_columns_in_the_order_of_all_experts_give_what_each_would_take_out(kind: str, device: torch.device) -> None:
    """Bit for bit: they are the same numbers. What has another order is nobody's wish."""
    x, generator = hidden(device), torch.Generator().manual_seed(3)
    order = (torch.randperm(HIDDEN, generator=generator) // 32).expand(EXPERTS, HIDDEN).to(device)
    gate_up, down = integers(kind, 2 * WIDTH, HIDDEN, order, device), integers(kind, HIDDEN, WIDTH, None, device)
    input_quant = fused.input_quant(gate_up)
    assert input_quant is not None
    assert input_quant.keeps_plain
    assert input_quant.column_permutation is not None
    made = QuantizedActivation.empty(3, HIDDEN, input_quant, x.device, x.dtype)
    codes = x.view(torch.int16)
    if kind == "int4 fp8":
        quantize(x, made.codes, made.scale)()
        codes = made.codes.view(torch.int8)
    moved = torch.empty_like(codes)
    moved[:, input_quant.column_permutation.long()] = codes
    rounded = QuantizedActivation(moved.view(made.codes.dtype), made.scale, x)
    assert torch.equal(output(rounded, gate_up, down, device), output(x, gate_up, down, device))
    others = order.clone()
    others[2] = others[2].flip(0)
    differ = integers(kind, 2 * WIDTH, HIDDEN, others, device)
    assert fused.input_quant(differ) is None
    with pytest.raises(ValueError, match=f"made for other experts, .* than these, {kind}"):
        output(rounded, differ, down, device)


def test_rounded_by_the_scale_of_all_experts_is_what_each_would_round(device: torch.device) -> None:
    """By a launch for it, that is; the norm rounds what it hasn't narrowed to bf16 before, as it does for others."""
    x, scale = hidden(device), torch.full((1,), 0.01, device=device)
    downs = torch.arange(1, EXPERTS + 1, device=device) / 100
    gate_up, down = floats(2 * WIDTH, HIDDEN, scale), floats(HIDDEN, WIDTH, downs)
    input_quant = fused.input_quant(gate_up)
    assert input_quant is not None
    assert input_quant.keeps_plain
    made = QuantizedActivation.empty(3, HIDDEN, input_quant, x.device, x.dtype)
    quantize(x, made.codes, made.scale, static_scale=input_quant.static_scale)()
    rounded = QuantizedActivation(made.codes, made.scale, x)
    each = floats(2 * WIDTH, HIDDEN, scale.repeat(EXPERTS))
    for plain in (gate_up, each):
        assert torch.equal(output(rounded, gate_up, down, device), output(x, plain, down, device))
    assert fused.input_quant(each) is None


def test_codes_that_experts_do_not_read_are_refused(device: torch.device) -> None:
    x, one = hidden(device), torch.ones(3, 1, device=device)
    gate_up, down = (integers("int4 fp8", *size, None, device) for size in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    with pytest.raises(ValueError, match=r"as torch\.int8, than these, int4 fp8"):
        output(QuantizedActivation(x.to(torch.int8), one, x), gate_up, down, device)
