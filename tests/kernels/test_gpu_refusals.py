"""Tensors that a kernel would read or write wrongly: launchers refuse each by its name.

A case is a launch whose tensors are right. Each in turn is a column short, has gaps between its rows, or between its
columns; what is right all the same, or is told of by another tensor's name, the case says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from attention_steps import make_cache, make_step
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.arguments import Output
from octavo.kernels.attention.gpu.decode import decode
from octavo.kernels.attention.gpu.prefill import prefill
from octavo.kernels.attention.gpu.rope import rope
from octavo.kernels.attention.gpu.rope_decode import rope_decode
from octavo.kernels.fp8.gpu import linear as fp8
from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.gemm.gpu import packed_linear, packing
from octavo.kernels.gemm.gpu.arguments import Pairs
from octavo.kernels.gemm.gpu.gemm_persistent import gemm_persistent
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed, gemm_swap_ab
from octavo.kernels.int4.gpu.dequantize import dequantize
from octavo.kernels.int4.gpu.permute_columns import gather
from octavo.kernels.int8.gpu import linear as int8
from octavo.kernels.moe.gpu import fused, route
from octavo.kernels.moe.gpu.permute_columns import permute_columns
from octavo.kernels.moe.gpu.router import router
from octavo.kernels.moe.gpu.shared_expert_activation import shared_expert_activation
from octavo.kernels.moe.gpu.static_quantize import static_quantize
from octavo.kernels.norm.gpu.activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.norm.gpu.embedding import embed
from octavo.kernels.norm.gpu.norm import norm
from octavo.kernels.norm.gpu.split_k_sum import split_k_sum
from octavo.kernels.quantized_activation import ActivationQuant, QuantizedActivation
from octavo.kernels.sampling.gpu import change, draw

E4M3, BF16, INT8, INT16, INT32 = torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.int16, torch.int32
M, N, K, EXPERTS, VOCAB = 3, 24, 64, 2, 300


def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """free: what isn't refused by the tensor's own name, such as "x size, w rows"."""

    launch: Callable[..., object]
    right: dict[str, Tensor]
    free: str = ""


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda t: t[..., :-1].contiguous(),
    "rows": lambda t: t.new_zeros(*t.shape[:-1], t.shape[-1] + 1)[..., :-1],
    "columns": lambda t: t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2],
}

EIGHT = {"x": of(M, K, dtype=E4M3), "w": of(N, K, dtype=E4M3), "x_scale": of(M, 1), "w_scale": of(N, 1), "bias": of(N)}
IN_BLOCKS = {**EIGHT, "x_scale": of(M, 1), "w_scale": of(1, 1)}
STRIDED = "w size, x_scale rows, x_scale columns, w_scale rows, w_scale columns"
ROWS, CODES = of(M, K, dtype=BF16), of(M, K, dtype=E4M3)
PACKED8 = packing.pack(of(N, K, dtype=INT8), of(N, 2, dtype=BF16), None, 32, bits=8)
PACKED4 = packing.pack(of(N, K, dtype=INT8), of(N, 2, dtype=BF16), None, 32)
PAIRS = route.unaligned(M * 2, EXPERTS, 16, "cpu")
MORE = route.unaligned(M * 3, EXPERTS + 2, 16, "cpu")
IN_TILES = {"order": PAIRS.order, "tile_expert": PAIRS.tile_expert}
OF_EXPERTS = {"x": of(M, K, dtype=BF16), "out": of(2 * M, N), "router": of(M, 2), **IN_TILES}
SHAPE, PLACES = AttentionShape(4, 2, 32, 1.0), dict.fromkeys(("positions", "slot_mapping"), of(2, dtype=torch.int64))
STEP = replace(make_step([1, 1], [90, 40], 8, torch.device("cpu")), **PLACES)
CACHE = make_cache(17, 2, 8, 32, BF16, BF16, torch.device("cpu"))
STEPS = {name: getattr(STEP, name) for name in ("block_tables", "seq_lens", "query_starts")}
QKV = {"qkv": of(2, 8 * 32), "cos_sin": of(99, 32), "q_norm": of(32), "k_norm": of(32)}
ROOM = {"out": of(2, 4, 32), "partial": of(2, 2, 2, 2, 32), "lse": of(2, 2, 2, 2), "counters": of(6, dtype=INT32)}
SHARES = {"block_n": 16, "min_split_tokens": 32, "max_splits": 2, "programs": 99}
ROUNDED = {"codes": of(2, 128, dtype=E4M3), "scale": of(2, 1), "static_scale": of(1)}
MOVED = {"codes": of(2, 128), "column_permutation": of(128, dtype=INT32)}


def in_step(launch: Callable[..., object], **sizes: Any) -> Callable[..., object]:
    """A launcher that finds the tensors of its step among the others."""

    def launched(**tensors: Tensor) -> object:
        own = [name for name in tensors if hasattr(STEP, name) and name != "cos_sin"]  # which is a layer's table here
        inputs = replace(STEP, **{name: tensors.pop(name) for name in own})
        more: dict[str, Any] = {"eps": 1e-5} if "qkv" in tensors else {}
        if "lse" in tensors:
            more["output"] = Output(*(tensors.pop(name) for name in Output._fields))
        return launch(inputs=inputs, cache=CACHE, shape=SHAPE, **more, **tensors, **sizes)

    return launched


def rounding(launch: Callable[..., object], **sizes: Any) -> Callable[..., object]:
    """`in_step`, of attention that rounds its rows into codes and scale, by a stored one or by places."""

    def launched(codes: Tensor, **tensors: Tensor) -> object:
        scale, stored, column_permutation = (
            tensors.pop(name, None) for name in ("scale", "static_scale", "column_permutation")
        )
        input_quant = ActivationQuant(
            None if scale is None else codes.dtype, 0, stored, column_permutation=column_permutation
        )
        into = QuantizedActivation(codes, of(2, 0) if scale is None else scale)
        return in_step(launch, **sizes, into=into, input_quant=input_quant)(**tensors)

    return launched


def pairs_of(tensors: dict[str, Tensor]) -> Pairs:
    return Pairs(aligned(tensors), 2, tensors.pop("router"))


def aligned(tensors: dict[str, Tensor]) -> route.Aligned:
    return route.Aligned(tensors.pop("order"), tensors.pop("tile_expert"), 16)


CASES = {
    "swap-AB": Case(gemm_swap_ab, {**EIGHT, "out": of(2, M, N)}, STRIDED),
    "swap-AB in blocks": Case(lambda **t: gemm_swap_ab(**t, blocks=True), {**IN_BLOCKS, "out": of(M, N)}, STRIDED),
    "persistent": Case(gemm_persistent, {**EIGHT, "out": of(M, N)}, STRIDED),
    "persistent by pointers": Case(lambda **t: gemm_persistent(**t, tma=0), {**EIGHT, "out": of(M, N)}, STRIDED),
    "quantize": Case(quantize, {"x": ROWS, "out": CODES, "scale": of(M, 1), "static_scale": of(1)}, "x size"),
    "quantize groups": Case(
        lambda **t: quantize(**t, group_size=32), {"x": ROWS, "out": CODES, "scale": of(M, 2)},
        "x size, scale rows, scale columns",
    ),
    "norm": Case(
        lambda **t: norm(eps=1e-5, **t),
        {"x": ROWS, "weight": of(K), "out": ROWS, "residual": ROWS, "total": ROWS, "after": of(K)},
        "x size, x rows",  # which lie anywhere
    ),
    "norm of parts": Case(
        lambda **t: norm(eps=1e-5, group_size=32, **t),
        {"x": of(2, M, K), "weight": of(K), "out": CODES, "scale": of(M, 2)}, "x size, x rows",
    ),
    "silu": Case(silu_and_mul, {"x": of(2, M, 2 * K), "out": ROWS}, "out size"),
    "gelu": Case(
        lambda **t: gelu_tanh_and_mul(**t, group_size=32), {"x": of(M, 2 * K), "out": CODES, "scale": of(M, 2)},
        "out size",
    ),
    "embed": Case(embed, {"token_ids": of(M, dtype=INT32), "table": of(9, K), "out": ROWS}, "out size"),
    "add up": Case(split_k_sum, {"partials": of(2, M, N), "out": of(M, N)}, "partials size"),
    "int8 weights": Case(
        lambda **t: gemm_packed(packed=PACKED8, **t), {"x": ROWS, "out": of(M, N)}, "x rows"
    ),
    "int8 packed": Case(
        lambda **t: packing.PackedWords(**t, storage="int8", k=K, group_size=32),
        {"words": PACKED8.words, "scale": PACKED8.scale, "bias": of(N)}, "words size",
    ),
    "gather": Case(gather, {"x": ROWS, "order": of(80, dtype=INT32), "out": of(M, 80)}, "x size, x rows, order size"),
    "dequantize": Case(lambda out: dequantize(PACKED4, out), {"out": of(N, K)}),
    "int4": Case(
        lambda **t: gemm_packed(packed=PACKED4, **t), {"x": CODES, "x_scale": of(M, 1), "out": of(2, M, N)}, "x rows"
    ),
    "int4 packed": Case(
        lambda **t: packing.PackedWords(storage="4 bits", group_size=32, k=K, **t),
        {"words": PACKED4.words, "scale": of(1, 4, N, 2), "order": of(1, K, dtype=INT32), "bias": of(N)},
        "words size, order size",
    ),
    "route": Case(
        lambda **t: route.route(**t, normalize=True), {"logits": of(M, 8), "chosen": of(M, 2), "weights": of(M, 2)},
        "logits size, chosen size",
    ),
    "align": Case(
        lambda chosen, **t: route.align(chosen, EXPERTS, aligned(t)), {"chosen": of(M, 2, dtype=INT32), **IN_TILES},
        "chosen size",
    ),
    "router": Case(
        lambda **t: router(t.pop("x"), t.pop("router"), pairs=aligned(t), normalize=True, block_e=16, block_k=64, **t),
        {
            "x": ROWS, "router": of(EXPERTS, K, dtype=BF16), "partial": of(4, M, EXPERTS),
            "counts": of(2, 1, 4, dtype=INT32), "ranks": of(2 * M + 1, dtype=INT32), "counters": of(2, dtype=INT32),
            "chosen": of(M, 2, dtype=INT32), "weights": of(M, 2), **IN_TILES,
        },
        "x size, chosen size",
    ),
    "router with a shared expert": Case(
        lambda **t: router(
            t.pop("x"), t.pop("router"), pairs=aligned(t), normalize=True, shared=2, block_e=16, block_k=64, **t
        ),
        {
            "x": ROWS, "router": of(EXPERTS + 1, K, dtype=BF16), "partial": of(4, M, EXPERTS + 1),
            "counts": of(2, 1, 32, dtype=INT32), "ranks": of(3 * M + 1, dtype=INT32), "counters": of(2, dtype=INT32),
            "chosen": of(M, 3, dtype=INT32), "weights": of(M, 3), "order": MORE.order, "tile_expert": MORE.tile_expert,
        },
        "x size, chosen size",
    ),
    "columns of pairs": Case(
        permute_columns,
        {"x": ROWS, "order": of(EXPERTS, K, dtype=INT32), "chosen": of(M, 2, dtype=INT32), "out": of(2 * M, K)},
        "x size, chosen size",
    ),
    "stored": Case(
        static_quantize,
        {"x": ROWS, "stored": of(EXPERTS), "chosen": of(M, 2, dtype=INT32), "out": of(2 * M, K, dtype=E4M3)}
        | {"scale": of(2 * M, 1)},
        "x size, stored size, chosen size, out size",
    ),
    "stored silu": Case(
        lambda **t: static_quantize(**t, gated=True),
        {"x": of(M, 2 * K), "stored": of(EXPERTS), "chosen": of(M, 1, dtype=INT32), "out": CODES, "scale": of(M, 1)},
        "stored size, chosen size, out size",
    ),
    "slices": Case(
        lambda **t: shared_expert_activation(**t, top_k=1, shared=2),
        {"x": of(M, 2 * K), "out": CODES, "scale": of(M, 1)}, "out size",
    ),
    "grouped": Case(
        lambda **t: gemm_swap_ab(pairs=pairs_of(t), **t),
        {**OF_EXPERTS, "x": CODES, "w": of(EXPERTS, N, K, dtype=E4M3), "x_scale": of(M, 1), "w_scale": of(EXPERTS, N)},
        STRIDED,
    ),
    "grouped int8 weights": Case(
        lambda **t: gemm_packed(packed=packing.stack([PACKED8] * EXPERTS), pairs=pairs_of(t), **t), OF_EXPERTS, "x rows"
    ),
    "experts packed": Case(
        lambda **t: packing.PackedWords(**t, storage="4 bits", group_size=32, k=K),
        {"words": of(EXPERTS, 1, N, 32, dtype=INT16), "scale": of(EXPERTS, 4, N, 2)}
        | {"order": of(EXPERTS, K, dtype=INT32)},
        "words size, order size",
    ),
    "sum of pairs": Case(lambda **t: fused.sum_experts(**t, top_k=2), {"pairs": of(2 * M, K), "out": ROWS}, "out size"),
    "biases": Case(
        change.add_biases, {"logits": of(M, 9), "rows": of(5), "tokens": of(5), "biases": of(5)},
        "logits size, rows size",
    ),
    "penalties": Case(
        change.punish,
        {
            "logits": of(M, 9), "rows": of(5), "tokens": of(5), "counts": of(5), "repetition": of(M),
            "frequency": of(M), "presence": of(M),
        },
        "logits size, rows size",
    ),
    "draw": Case(
        lambda peaks, masses, kept, places, **t: draw.launches(**t, scratch=(peaks, masses, kept, places)),
        {
            "logits": of(M, VOCAB), "tokens": of(M), "uniforms": of(M),
            **dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), of(M)),
            **dict(zip(("peaks", "masses", "kept", "places"), draw.scratch(M, VOCAB, "cpu"), strict=True)),
        },
        "logits size",
    ),
    "cache": Case(
        LayerCache, {name: getattr(CACHE, name) for name in ("key", "value", "key_scale", "value_scale")}, "key size"
    ),
    "prefill": Case(
        in_step(prefill, block_m=32, block_n=16), {"q": of(2, 4, 32), "out": of(2, 4, 32), **STEPS},
        "block_tables size",
    ),
    "decode": Case(in_step(decode, **SHARES), {"q": of(2, 4, 32), **ROOM, **STEPS}, "block_tables size"),
    "decode that rounds": Case(
        rounding(decode, **SHARES), {"q": of(2, 4, 32), **ROOM, **STEPS, **ROUNDED}, "block_tables size"
    ),
    "rope": Case(in_step(rope), {**QKV, **PLACES, "q": of(2, 4, 32)}),
    "rope and decode": Case(in_step(rope_decode, **SHARES), {**QKV, **PLACES, **ROOM, **STEPS}, "block_tables size"),
    "rope and decode that moves": Case(
        rounding(rope_decode, **SHARES), {**QKV, **PLACES, **ROOM, **STEPS, **MOVED}, "block_tables size"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_right_is_taken(name: str) -> None:
    CASES[name].launch(**CASES[name].right)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", CASES)
def test_each_tensor_is_refused_by_its_name(name: str, kind: str) -> None:
    case = CASES[name]
    for argument, tensor in case.right.items():
        if f"{argument} {kind}" not in case.free.split(", "):
            wrong = WRONG[kind](tensor)
            if kind == "size" or not wrong.is_contiguous():  # one row has no gap before the next
                with pytest.raises(ValueError, match=rf"\b{argument}\b.*\b{wrong.shape[-1]}\b"):
                    case.launch(**{**case.right, argument: wrong})


def test_a_layer_takes_what_its_weight_has_columns_for(device: torch.device) -> None:
    """Right layers first; x is too narrow, or too wide, for what they hold."""
    codes, one = torch.zeros(N, K, device=device), torch.ones((), device=device)
    points, order = torch.zeros(N, 2, device=device), torch.arange(K, device=device).flip(0) // 32
    four_bits = packing.pack(codes.to(INT8), points, None, order)
    eight_bits = packing.pack(codes.to(INT8), points, None, 32, bits=8)
    layers: list[tuple[Callable[..., Tensor], object]] = [
        (fp8.linear, fp8.pack(codes.to(E4M3), one)),
        (fp8.linear, fp8.pack(codes.to(E4M3), torch.ones(1, 1, device=device), blocks=True)),
        (int8.linear, int8.pack(codes.to(INT8), one)),
        (packed_linear.linear, eight_bits),
        (packed_linear.linear, four_bits),
        (packed_linear.linear_fp8, four_bits),
    ]
    for linear, packed in layers:
        assert linear(torch.ones(1, K, device=device).to(BF16), packed).shape == (1, N)
        for wrong in (K // 2, 2 * K):
            with pytest.raises(ValueError, match=rf"\[1, {wrong}\].* 64\b|\b{wrong} columns.* 64\b|\[1, 64\]"):
                linear(torch.ones(1, wrong, device=device).to(BF16), packed)


def test_a_router_and_its_experts_go_together(device: torch.device) -> None:
    gate_up = fused.Experts(torch.ones(2, 2 * K, K, device=device).to(BF16))
    down, x = fused.Experts(torch.ones(2, K, K, device=device).to(BF16)), torch.ones(M, K, device=device).to(BF16)
    for shape in ((3, K), (2, K - 1)):
        with pytest.raises(ValueError, match=r"router .*\[2, 64\]"):
            fused.fused_moe(x, torch.ones(shape, device=device), 1, gate_up, down, normalize=True)
    for dtype in (BF16, torch.float32):  # one launch, and two
        with pytest.raises(ValueError, match=r"chosen .*\[3, 2\]"):
            fused.fused_moe(x, torch.ones(2, K, device=device).to(dtype), 3, gate_up, down, normalize=True)


def test_a_cache_of_other_heads_is_refused() -> None:
    other = AttentionShape(4, 1, 64, 1.0)
    q = of(2, 4, 64)
    with pytest.raises(ValueError, match=r"the cache's key .*\[17, 1, 8, 64\]"):
        prefill(q, STEP, CACHE, other, q, block_m=32, block_n=16)


def test_packing_takes_what_goes_with_the_codes() -> None:
    codes = of(EXPERTS, N, K, dtype=INT8)
    with pytest.raises(ValueError, match=r"groups .* 64 numbers"):
        packing.pack(codes[0], of(N, 2), None, torch.arange(K - 1) // 32)
    with pytest.raises(ValueError, match="the scale's 1 groups"):
        packing.pack(codes[0], of(N, 1), None, 32)
    with pytest.raises(ValueError, match=r"no scale of shape \[23, 2\]"):
        packing.pack(codes[0], of(N - 1, 2), None, 32)
    for shape in ((N, 1), (N - 1, 2)):
        with pytest.raises(ValueError, match=r"zero_point .*\[24, 2\]"):
            packing.pack(codes[0], of(N, 2), of(*shape), 32)


def test_what_is_said_names_the_tensor_and_what_would_work() -> None:
    with pytest.raises(
        ValueError, match=r"^out has the shape \[3, 9\]; with the other arguments it needs .* \[3, 24\]$"
    ):
        split_k_sum(of(2, M, N), of(M, 9))
    with pytest.raises(
        ValueError, match=r"^partials \[2, 3, 24\] has strides \[96, 32, 1\]; .* contiguous\(\) makes it$"
    ):
        split_k_sum(of(2, M, 32)[..., :N], of(M, N))
