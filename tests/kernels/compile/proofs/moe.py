"""Launches of kernels/moe that are compiled ahead of time."""

from __future__ import annotations

import torch
from proof import PAST_L1, WITHIN_L1, Proof, meta

from octavo.kernels.gemm.gpu.arguments import Pairs
from octavo.kernels.gemm.gpu.gemm_swap_ab import SWAPPED, gemm_packed, gemm_swap_ab
from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.moe.gpu.fused import sum_experts
from octavo.kernels.moe.gpu.permute_columns import permute_columns
from octavo.kernels.moe.gpu.route import align, route, unaligned
from octavo.kernels.moe.gpu.router import routing
from octavo.kernels.moe.gpu.shared_expert_activation import shared_expert_activation
from octavo.kernels.moe.gpu.static_quantize import static_quantize


def route_proofs() -> dict[str, Proof]:
    """Qwen3's and DeepSeek-V3's routers: 128-bit loads."""
    made: dict[str, Proof] = {}
    for num_experts, top_k, num_tokens in ((128, 8, 1), (128, 8, 64), (256, 8, 4096)):
        logits = torch.empty(num_tokens, num_experts, device="meta")
        chosen = torch.empty(num_tokens, top_k, dtype=torch.int32, device="meta")
        pairs = unaligned(chosen.numel(), num_experts, 64, "meta")
        name = f"{top_k} of {num_experts}, {num_tokens} tokens"
        made[f"route {name}"] = Proof(route(logits, chosen, logits, normalize=True), (r"LDG\.E\.128",))
        if num_tokens > 1:  # 8 pairs of one are a quarter of a warp's 128-bit loads
            made[f"align {name}"] = Proof(align(chosen, num_experts, pairs), (r"LDG\.E\.128",))
    return made


def router_proofs() -> dict[str, Proof]:
    """Qwen3's, Mixtral's, Qwen3-Next's and Qwen1.5's routers: tensor cores, and weights copied 16 bytes at a time."""
    made: dict[str, Proof] = {}
    half = torch.float16
    bf16 = torch.bfloat16
    for num_experts, top_k, shared, hidden, num_tokens, dtype in (
        (128, 8, 0, 2048, 1, bf16),
        (128, 8, 0, 2048, 16, bf16),
        (128, 8, 0, 2048, 64, bf16),
        (128, 8, 0, 2048, 256, bf16),
        (128, 8, 0, 2048, 512, bf16),
        (16, 1, 0, 2048, 1, bf16),
        (8, 2, 0, 4096, 1, bf16),
        (8, 2, 0, 4096, 512, half),
        (512, 10, 0, 2048, 512, bf16),
        (60, 4, 4, 2048, 1, bf16),
        (60, 4, 4, 2048, 64, bf16),
    ):
        x, weight = (meta(rows, hidden, dtype=dtype) for rows in (num_tokens, num_experts + min(shared, 1)))
        chosen = meta(num_tokens, top_k + shared, dtype=torch.int32)
        weights = meta(num_tokens, top_k + shared)
        pairs = unaligned(chosen.numel(), num_experts + shared, 16, "meta")
        (launch,) = routing(x, weight, chosen, weights, pairs, normalize=True, shared=shared)
        name = f"{str(dtype).removeprefix('torch.')}, {top_k} of {num_experts}, {num_tokens} tokens"
        name += f", {shared} for all" if shared else ""
        made[name] = Proof(launch, (r"H[GM]*MMA\.", r"LDGSTS\.E\.BYPASS.*128", "ATOMG", PAST_L1), (WITHIN_L1,))
    return made


def permute_columns_proofs() -> dict[str, Proof]:
    """Mixtral's: the order is read, and pairs written, in wide pieces; x itself is scattered."""
    x, out = (meta(rows, 4096, dtype=torch.bfloat16) for rows in (64, 128))
    order, chosen = (meta(*size, dtype=torch.int32) for size in ((8, 4096), (64, 2)))
    return {"of pairs": Proof(permute_columns(x, order, chosen, out), (r"LDG\.E\.128", r"STG\.E\.128"))}


def static_quantize_proofs() -> dict[str, Proof]:
    """Mixtral's: 128-bit loads and stores."""
    made: dict[str, Proof] = {}
    chosen = meta(64, 2, dtype=torch.int32)
    stored = meta(8)
    for width, gated in ((4096, False), (14336, True)):
        x = meta(128 if gated else 64, width * (1 + gated), dtype=torch.bfloat16)
        out = meta(128, width, dtype=torch.float8_e4m3fn)
        launch = static_quantize(x, stored, chosen, out, meta(128, 1), gated=gated)
        made[f"{'silu' if gated else 'x'} fp8 {width}"] = Proof(launch, (r"LDG\.E\.128", r"STG\.E\.128"))
    return made


def shared_expert_activation_proofs() -> dict[str, Proof]:
    """Qwen2-57B's: 128-bit loads, and stores of what a thread has."""
    width = 2560
    top_k = 8
    shared = 8
    rows = 64 * (top_k + shared)
    x = meta(rows, 2 * width, dtype=torch.bfloat16)
    out = meta(rows, width, dtype=torch.float8_e4m3fn)
    launch = shared_expert_activation(x, out, meta(rows, 1), top_k, shared)
    name = f"silu fp8, {top_k} experts and {shared} slices of {width}"
    return {name: Proof(launch, (r"LDG\.E\.128", r"STG\.E\.(128|64)"))}


def grouped_proofs() -> dict[str, Proof]:
    """Mixtral's second GEMM, with the router's weights: full-rate instructions, weights copied 16 bytes at a time."""
    made: dict[str, Proof] = {}
    fp8 = torch.float8_e4m3fn
    num_experts = 8
    n = 4096
    k = 14336
    num_pairs = 512
    kinds = {"bf16": torch.bfloat16, "fp8": fp8, "fp8 blocks": fp8, "fp8 rows of blocks": fp8, "int8": torch.int8}
    for block_m, block_n, warps, stages in ((16, 64, 4, 5), (64, 128, 4, 3), (128, 128, 8, 3)):
        pairs = Pairs(unaligned(num_pairs, num_experts, block_m, "meta"), 1, meta(256, 2))
        for kind, dtype in kinds.items():
            if block_m == 64 and "blocks" not in kind:  # as the others
                continue
            x = meta(num_pairs, k, dtype=dtype)
            w = meta(num_experts, n, k, dtype=dtype)
            out = meta(num_pairs, n)
            out = out.to(torch.bfloat16)
            x_scale = w_scale = None
            if dtype != torch.bfloat16:
                in_blocks = "blocks" in kind
                rows = n // 128 if kind == "fp8 blocks" else n
                x_scale = meta(k // 128, num_pairs).T if in_blocks else meta(num_pairs, 1)
                w_scale = meta(num_experts, rows, k // 128) if in_blocks else meta(num_experts, n)
            sizes = {"block_n": block_n, "block_k": 64 if dtype == torch.bfloat16 else 128, "group_m": 8}
            sizes |= {"num_warps": warps, "num_stages": stages}
            launch = gemm_swap_ab(x, w, x_scale, w_scale, out, pairs=pairs, blocks="blocks" in kind, **sizes)
            columns = block_m if block_m <= SWAPPED else launch.arguments["BLOCK_N"]
            op = {fp8: "QGMMA", torch.int8: "IGMMA"}.get(dtype, "HGMMA") + rf"\.64x{columns}x"
            made[f"{kind} {block_m} x {launch.arguments['BLOCK_N']}"] = Proof(
                launch, (op, r"LDGSTS\.E\.BYPASS.*128"), ("HMMA",), hopper_only=True
            )
    return made


def int4_proofs() -> dict[str, Proof]:
    """Mixtral's second GEMM: weights go from registers into full-rate instructions, copied 16 bytes at a time."""
    made: dict[str, Proof] = {}
    num_experts = 8
    n = 4096
    k = 14336
    num_pairs = 512
    bf16 = torch.bfloat16
    fp16 = torch.float16
    for dtype, group_size, has_zero, block_m, block_n, warps in (
        (bf16, 128, False, 16, 64, 4),
        (bf16, 32, True, 16, 64, 4),
        (fp16, 128, True, 16, 64, 4),
        (bf16, 64, False, 64, 128, 8),
    ):
        scale = meta(num_experts, k // group_size, n, *([2] if has_zero else []), dtype=bf16)
        words = meta(num_experts, k // 128, n, 32, dtype=torch.int16)
        packed = PackedWords(words, scale, "4 bits", group_size, k)
        pairs = Pairs(unaligned(num_pairs, num_experts, block_m, "meta"), 1, meta(256, 2))
        x, out = (meta(num_pairs, columns, dtype=dtype) for columns in (k, n))
        launch = gemm_packed(x, packed, out, pairs=pairs, block_n=block_n, group_m=8, num_warps=warps)
        name = f"{str(dtype).removeprefix('torch.')} groups of {group_size}{' with zeros' if has_zero else ''}"
        expects = (rf"HGMMA\.64x{block_m}x16.*\.RS", r"LDGSTS\.E\.BYPASS.*128")
        made[f"{name} {block_m} x {block_n}"] = Proof(launch, expects, ("HMMA", r"I2F(?!\.RP)"), hopper_only=True)
    return made


def int8_proofs() -> dict[str, Proof]:
    """Mixtral's second GEMM: weights go from registers into full-rate instructions, copied 16 bytes at a time."""
    made: dict[str, Proof] = {}
    num_experts = 8
    n = 4096
    k = 14336
    num_pairs = 512
    bf16 = torch.bfloat16
    fp16 = torch.float16
    for dtype, group, has_zero, block_m, block_n, warps in (
        (bf16, 32, True, 16, 64, 4),
        (fp16, 128, True, 16, 64, 4),
        (bf16, 0, False, 64, 128, 8),
        (bf16, 128, False, 16, 64, 4),
    ):
        is_e4m3 = group == 128 and not has_zero
        groups = k // (group or k)
        tile = min(group or 128, 128)
        words = meta(num_experts, k // tile, n, tile // 2, dtype=torch.int16)
        scale = meta(num_experts, groups, n, *([2] if has_zero else []), dtype=bf16)
        pairs = Pairs(unaligned(num_pairs, num_experts, block_m, "meta"), 1, meta(256, 2))
        packed = PackedWords(words, scale, "e4m3" if is_e4m3 else "int8", group, k)
        x, out = (meta(num_pairs, columns, dtype=dtype) for columns in (k, n))
        launch = gemm_packed(x, packed, out, pairs=pairs, block_n=block_n, group_m=8, num_warps=warps)
        name = f"{str(dtype).removeprefix('torch.')} {f'groups of {group}' if group else 'rows'}"
        expects = (rf"HGMMA\.64x{block_m}x16", r"LDGSTS\.E\.BYPASS.*128")
        name = f"e4m3 {name}" if is_e4m3 else name
        made[f"{name}{' with zeros' if has_zero else ''} {block_m} x {block_n}"] = Proof(
            launch, expects, ("HMMA",), hopper_only=True
        )
    return made


def fused_proofs() -> dict[str, Proof]:
    """The sum for Qwen3: 128-bit loads and stores."""
    pairs, out = (torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta") for rows in (512, 64))
    return {"sum of 8": Proof(sum_experts(pairs, out, 8), (r"LDG\.E\.128", r"STG\.E\.128"))}
