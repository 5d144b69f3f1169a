"""The operators that the decoder calls besides its linear layers, as one value chosen at load.

The signatures are the contract between the decoder and the kernels room. `octavo.kernels.*.reference` is what they
mean; a device's bodies are compared with it in tests. T tokens, H hidden, Hq and Hkv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from octavo.kernels.attention import reference as attention_reference
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.norm import reference as fused_reference


class RopeAndCache(Protocol):
    """Split qkv, normalize q and k (when weights are given), rotate both, write k and v into the cache; return q.

    qkv        [T, (Hq + 2 Hkv) * D]
    cos_sin    None (this layer has no positions), or [max_position, rotary_dim] float32: cos in the first half, sin
               in the second; the first rotary_dim elements of each head rotate, pairing i with i + rotary_dim / 2
    q_norm, k_norm  None, or float32 RMSNorm weights, [D] (over each head) or [Hq * D], [Hkv * D] (over all heads)
    returns    q [T, Hq, D]
    """

    def __call__(
        self,
        qkv: Tensor,
        inputs: StepInputs,
        cache: LayerCache,
        shape: AttentionShape,
        cos_sin: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Ops:
    """One body for each operator.

    embed(token_ids [T], table [V, H], factor) -> [T, H]: rows of the table times a number
    rms_norm(x [T, H], weight [H] float32, eps) -> [T, H]: computed in float32, returned in x's type
    add_rms_norm(x, residual, weight, eps, after, multiplier) -> (normed, x + residual): the sum is rounded to x's type,
        then normed; x itself is normed by `after` and multiplied before; without a weight the sum is returned twice
    silu_and_mul(gate_up [T, 2 I]) -> [T, I]: act(first half) * second half
    gelu_tanh_and_mul(gate_up [T, 2 I]) -> [T, I]
    attention(q [T, Hq, D], inputs, cache, shape) -> [T, Hq * D]: causal over the cache, which holds this step's own
        keys and values already
    rope_and_attention  of rope_and_cache's arguments: attention of what that returns

    A GPU's bodies also take x, gate_up and qkv as split-K partial sums [S, T, ...] float32. Their norms, activations
    and rope_and_attention take a last argument `input_quant`, an ActivationQuant; with it they return a
    QuantizedActivation (attention in a decode step only). The CPU's get neither: its linear layers make no partial sums
    and quantize their own input.
    """

    name: str
    embed: Callable[[Tensor, Tensor, float], Tensor]
    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., tuple[Any, Tensor]]
    silu_and_mul: Callable[..., Any]
    gelu_tanh_and_mul: Callable[..., Any]
    rope_and_cache: RopeAndCache
    attention: Callable[[Tensor, StepInputs, LayerCache, AttentionShape], Tensor]
    rope_and_attention: Callable[..., Any]


def one_after_the_other(
    rope_and_cache: RopeAndCache, attention: Callable[[Tensor, StepInputs, LayerCache, AttentionShape], Tensor]
) -> Callable[..., Tensor]:
    """`rope_and_attention` of the two."""

    def rope_and_attention(
        qkv: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, *rotation_and_norms: Any
    ) -> Tensor:
        return attention(rope_and_cache(qkv, inputs, cache, shape, *rotation_and_norms), inputs, cache, shape)

    return rope_and_attention


REFERENCE = Ops(
    name="reference",
    embed=fused_reference.embed,
    rms_norm=fused_reference.rms_norm,
    add_rms_norm=fused_reference.add_rms_norm,
    silu_and_mul=fused_reference.silu_and_mul,
    gelu_tanh_and_mul=fused_reference.gelu_tanh_and_mul,
    rope_and_cache=attention_reference.rope_and_cache,
    attention=attention_reference.paged_attention,
    rope_and_attention=one_after_the_other(attention_reference.rope_and_cache, attention_reference.paged_attention),
)
