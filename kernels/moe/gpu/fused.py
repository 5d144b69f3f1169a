"""A mixture's way on a GPU: route and sort, round or move, grouped GEMM, SiLU * up, grouped GEMM, each token's sum.

out[t] = sum over j of weights[t, j] * down(silu(gate(x[t])) * up(x[t])) of expert chosen[t, j], the sum in float32 in
the order of j: the same bits whatever else is in the batch with the same tiles. Every launch's size comes from the
number of tokens alone, so that a CUDA graph holds them all. Reference: `moe.reference.grouped`.

An expert that all tokens go to is several of the others' size, which add up to it: `shared` slices behind the others,
which the router doesn't choose but weights with the sigmoid of its last row's logit. So nothing is launched for it.
Limit: the experts that are hit once each, over 3.0 TB/s on an H100; see `gemm.gpu.gemm_swap_ab`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.gemm.gpu.arguments import BLOCK, Pairs
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed, gemm_swap_ab
from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.int4.gpu.permute_columns import gather
from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import narrow
from octavo.kernels.moe.gpu.permute_columns import permute_columns
from octavo.kernels.moe.gpu.route import unaligned
from octavo.kernels.moe.gpu.router import routing
from octavo.kernels.moe.gpu.shared_expert_activation import shared_expert_activation
from octavo.kernels.moe.gpu.static_quantize import static_quantize
from octavo.kernels.norm.gpu.activation import silu_and_mul
from octavo.kernels.packed_weight import PackedWeight, present
from octavo.kernels.quantized_activation import ActivationQuant, Hidden, QuantizedActivation


@dataclass(frozen=True)
class Experts(PackedWeight):
    """All experts' weights, one behind another.

    weight       [E, N, K] bf16, fp16, e4m3 or int8
    scale        of codes, float32 [E, N]; of blocks of e4m3 [E, ceil(N / 128), ceil(K / 128)], or [E, N, ceil(K / 128)]
    input_scale  float32, of e4m3 with scales of rows: a checkpoint's [E] for what each expert reads, or [1] for all;
                 None: each row's own
    """

    weight: Tensor
    scale: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def blocks(self) -> bool:
        return self.scale is not None and self.scale.dim() == 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K) of the weights."""
        e, n, k = self.weight.shape
        return e, n, k

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.weight, self.scale, self.input_scale)

    def unpack(self) -> Tensor:
        values = self.weight.float()
        if self.scale is None:
            return values
        if not self.blocks:
            return values * self.scale[..., None]
        _, n, k = self.shape
        rows = self.scale if self.scale.shape[1] == n else self.scale.repeat_interleave(BLOCK, 1)[:, :n]
        return values * rows.repeat_interleave(BLOCK, 2)[..., :k]


Weights = Experts | PackedWords
CODES = {**dict.fromkeys(("fp8", "fp8 blocks", "int4 fp8"), torch.float8_e4m3fn), "int8": torch.int8}
"""What the GEMMs of some weights read, each with a scale of its row, or of 128 columns of it."""


@triton.jit
def _sum(pairs, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    await_previous(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = at < width
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(pairs + (token * TOP_K + j) * width + at, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + token * width + at, narrow(total, out.dtype.element_ty), mask=seen)


def sum_experts(pairs: Tensor, out: Tensor, top_k: int) -> Launch:
    """pairs [T * top_k, H] summed over the top_k of each token, first to last, into out [T, H]."""
    num_tokens, width = out.shape
    expect(pairs=(pairs, (num_tokens * top_k, width)), out=(out, (num_tokens, width)))
    sizes = tuning.choose("moe sum", num_tokens, width, top_k, out.device)
    block = sizes.pop("block")
    arguments = {"pairs": pairs, "out": out, "width": width, "TOP_K": top_k, "BLOCK": block}
    return Launch(_sum, (num_tokens, cdiv(width, block)), arguments, **sizes, num_stages=1)


def launches(
    x: Hidden,
    router: Tensor,
    top_k: int,
    gate_up: Weights,
    down: Weights,
    results: Tensor,
    *,
    normalize: bool,
    shared: int = 0,
) -> tuple[Launch, ...]:
    """All that happens but the sum, in order; memory between them is allocated here.

    x        [T, H] bf16 or fp16, or rounded as `input_quant` of gate_up has it
    router   [E, H] of x's type, or float32
    gate_up  [E, 2 I, H], down [E, H, I]: both plain, both e4m3, both int8, both packed with 4 bits, or with 8
    results  [T * top_k, H] of x's type: what each of a token's experts gives it, times its weight
    shared   how many more experts, slices of a shared one: then router [E + 1, H], gate_up [E + shared, 2 I, H], down
             [E + shared, H, I], results [T * (top_k + shared), H]
    """
    num_experts, width, hidden = gate_up.shape
    kind = _kind(gate_up)
    plain = _plain(x)
    num_tokens = plain.shape[0]
    if kind != _kind(down) or down.shape != (num_experts, hidden, width // 2) or plain.shape[1] != hidden:
        raise ValueError(f"x {list(plain.shape)}, gate_up {kind} {gate_up.shape} and down {_kind(down)} {down.shape}")
    stored = _stored(gate_up), _stored(down)
    if (stored[0] is None) != (stored[1] is None) or (stored[0] is not None and kind != "fp8"):
        raise ValueError(
            f"gate_up and down, {kind}, have input_scale both, as e4m3 with a scale for each row, or neither"
        )
    if _order(down) is not None:
        raise ValueError("down has act-order: gate and up are to make its columns in the order of its groups")
    expect(router=(router, (num_experts - max(shared - 1, 0), hidden)))
    each = top_k + shared
    num_pairs = num_tokens * each
    group_size = BLOCK if kind == "fp8 blocks" else 0
    device = results.device
    size: dict[str, Any] = tuning.choose(f"moe {kind}", cdiv(num_pairs, num_experts), width, hidden, device)
    pairs = unaligned(num_pairs, num_experts, size.pop("block_m"), device)
    chosen = torch.empty(num_tokens, each, dtype=torch.int32, device=device)
    weights = torch.empty(num_tokens, each, dtype=torch.float32, device=device)
    between = results.new_empty(num_pairs, width)
    activated, activated_scale = _rows(results, num_pairs, width // 2, kind)
    steps = [*routing(plain, router, chosen, weights, pairs, normalize=normalize, shared=shared)]
    first, first_scale, divisor = _first(x, gate_up, chosen, group_size, steps)
    return (
        *steps,
        _gemm(first, first_scale, gate_up, Pairs(pairs, divisor), between, size),
        _activation(between, activated, activated_scale, group_size, stored[1], chosen, shared),
        _gemm(activated, activated_scale, down, Pairs(pairs, 1, weights), results, size),
    )


def _first(
    x: Hidden, gate_up: Weights, chosen: Tensor, group_size: int, steps: list[Launch]
) -> tuple[Tensor, Tensor | None, int]:
    """Return the first GEMM's input, its scales, and how many pairs share a row; append what produces it to `steps`."""
    kind = _kind(gate_up)
    order = _order(gate_up)
    stored = _stored(gate_up)
    divisor = chosen.shape[1]
    if isinstance(x, QuantizedActivation):
        if not _is_made_before(gate_up) or x.codes.dtype != CODES.get(kind, _plain(x).dtype):
            raise ValueError(
                f"x is made for other experts, as {x.codes.dtype}, than these, {kind}: see input_quant(gate_up)"
            )
        return x.codes, x.scale if kind in CODES else None, divisor
    if order is not None and len(order) == 1:
        plain = x
        x = torch.empty_like(x)
        steps.append(gather(plain, order[0], x))
    elif order is not None:
        plain = x
        x = x.new_empty(chosen.numel(), x.shape[1])
        divisor = 1
        steps.append(permute_columns(plain, order, chosen, x))
    if kind not in CODES:
        return x, None, divisor
    own = None if stored is None or len(stored) == 1 else stored
    codes, scale = _rows(x, x.shape[0] if own is None else chosen.numel(), x.shape[1], kind)
    assert scale is not None
    if own is not None:
        steps.append(static_quantize(x, own, chosen, codes, scale))
        return codes, scale, 1
    steps.append(quantize(x, codes, scale, group_size=group_size, static_scale=stored))
    return codes, scale, divisor


def _activation(
    x: Tensor, out: Tensor, scale: Tensor | None, group_size: int, stored: Tensor | None, chosen: Tensor, shared: int
) -> Launch:
    """SiLU * up of each pair, rounded as down reads it: by its expert's scale, its own, or that of all slices."""
    if scale is not None and stored is not None and len(stored) > 1:
        return static_quantize(x, stored, chosen, out, scale, gated=True)
    if scale is not None and stored is None and not group_size and shared > 1:
        return shared_expert_activation(x, out, scale, chosen.shape[1] - shared, shared)
    return silu_and_mul(x, out, scale=scale, group_size=group_size, static_scale=stored)


def _stored(weights: Weights) -> Tensor | None:
    return weights.input_scale if isinstance(weights, Experts) else None


def _order(weights: Weights) -> Tensor | None:
    return None if isinstance(weights, Experts) else weights.order


def input_quant(gate_up: Weights) -> ActivationQuant | None:
    """What all experts read, if it is the same, and not x itself: the norm before makes it then, and x for the router.

    Whoever calibrates every expert with all tokens finds one scale for them, and one order.
    """
    if not _is_made_before(gate_up):
        return None
    kind = _kind(gate_up)
    order = _order(gate_up)
    column_permutation = None if order is None else order[0].argsort().int()
    size = BLOCK if kind == "fp8 blocks" else 0
    return ActivationQuant(
        CODES.get(kind), size, _stored(gate_up), keeps_plain=True, column_permutation=column_permutation
    )


def _is_made_before(gate_up: Weights) -> bool:
    order = _order(gate_up)
    stored = _stored(gate_up)
    same = all(of is None or len(of) == 1 for of in (order, stored))
    return same and (_kind(gate_up) in CODES or order is not None)


def _kind(weights: Weights) -> str:
    if isinstance(weights, PackedWords):
        return "w8a16" if weights.bits == 8 else "int4 fp8" if weights.fp8 else "int4"
    if weights.scale is None:
        return "bf16"
    return "int8" if weights.weight.dtype == torch.int8 else "fp8 blocks" if weights.blocks else "fp8"


def _rows(x: Tensor, rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor | None]:
    """Memory for what a GEMM reads, and its scales if it has any."""
    if kind not in CODES:
        return x.new_empty(rows, columns), None
    groups = cdiv(columns, BLOCK) if kind == "fp8 blocks" else 1
    codes = torch.empty(rows, columns, dtype=CODES[kind], device=x.device)
    return codes, torch.empty(rows, groups, dtype=torch.float32, device=x.device)


def _gemm(
    x: Tensor, x_scale: Tensor | None, weights: Weights, pairs: Pairs, out: Tensor, size: dict[str, Any]
) -> Launch:
    if isinstance(weights, PackedWords):
        return gemm_packed(x, weights, out, x_scale, pairs=pairs, **size)
    return gemm_swap_ab(x, weights.weight, x_scale, weights.scale, out, pairs=pairs, blocks=weights.blocks, **size)


def fused_moe(
    x: Hidden, router: Tensor, top_k: int, gate_up: Weights, down: Weights, *, normalize: bool, shared: int = 0
) -> Tensor:
    """The mixture's output for x [T, H], of what `launches` takes: `partial_moe` summed, rounded."""
    results = partial_moe(x, router, top_k, gate_up, down, normalize=normalize, shared=shared)
    out = results.new_empty(results.shape[1:])
    sum_experts(results.transpose(0, 1).flatten(0, 1), out, len(results))()
    return out


def partial_moe(
    x: Hidden, router: Tensor, top_k: int, gate_up: Weights, down: Weights, *, normalize: bool, shared: int = 0
) -> Tensor:
    """What each token's experts give it [top_k + shared, T, H], for the next kernel to add up; a token's lie side by
    side."""
    num_tokens, hidden = _plain(x).shape
    each = top_k + shared
    results = _plain(x).new_empty(num_tokens * each, hidden)
    for launch in launches(x, router, top_k, gate_up, down, results, normalize=normalize, shared=shared):
        launch()
    return results.view(num_tokens, each, hidden).transpose(0, 1)


def _plain(x: Hidden) -> Tensor:
    plain = x.plain if isinstance(x, QuantizedActivation) else x
    assert plain is not None
    return plain
