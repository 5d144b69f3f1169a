"""The operators that the decoder calls besides its linear layers, as one value chosen at load.

The signatures are the contract between the decoder and the kernels room, the same for every device; arguments are
positional. `octavo.kernels.*.reference` is what they mean; a device's bodies are compared with it in tests.
T tokens, H hidden, Hq and Hkv heads, D head size, I inner size of an MLP.

A GPU's bodies do two more things, which only linear layers on a GPU need. They take split-K parts of x, gate_up and
qkv, [S, T, ...] float32, and sum them first. And with an `input_quant` they return their result quantized as the next
GEMM reads it (kernels/quantized_activation.py). Other bodies refuse an `input_quant`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.kernels.attention import reference as attention_reference
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.latent import LatentBody, write_latents
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.hadamard.reference import hadamard_rows
from octavo.kernels.linear_attention import gated_delta as gated_delta_reference
from octavo.kernels.linear_attention.gated_delta import GatedDeltaBody
from octavo.kernels.linear_attention.mamba2 import Mamba2Body
from octavo.kernels.linear_attention.short_conv import ShortConvDecode
from octavo.kernels.norm import reference as norm_reference
from octavo.kernels.quantized_activation import ActivationQuant, Hidden, refuse_input_quant


class Embed(Protocol):
    """Rows of a table [V, H] at token_ids [T], times a factor: [T, H]."""

    def __call__(self, token_ids: Tensor, table: Tensor, factor: float, /) -> Tensor: ...


class RmsNorm(Protocol):
    """x [T, H] normed, times weight [H] float32: computed in float32, returned in the model's type."""

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, input_quant: ActivationQuant | None = None, /
    ) -> Hidden: ...


class AddRmsNorm(Protocol):
    """(normed sum, sum) of x [T, H] and residual [T, H]; the sum is rounded to the model's type, then normed.

    x itself is normed by `after` [H] float32, where that is given, and multiplied before it is added. Without a weight
    the sum is returned twice.
    """

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        after: Tensor | None = None,
        multiplier: float = 1.0,
        input_quant: ActivationQuant | None = None,
        /,
    ) -> tuple[Hidden, Tensor]: ...


class GatedActivation(Protocol):
    """gate_up [T, 2 I] -> act(first half) * second half [T, I]; where there is no gate, up [T, I] -> act(up) [T, I]."""

    def __call__(self, gate_up: Tensor, input_quant: ActivationQuant | None = None, /) -> Hidden: ...


class ClampedSwiglu(Protocol):
    """gate_up [T, 2 I] -> [T, I]: g * sigmoid(alpha g) * (u + 1), g and u as far as limit goes."""

    def __call__(
        self, gate_up: Tensor, alpha: float, limit: float, input_quant: ActivationQuant | None = None, /
    ) -> Hidden: ...


class RopeAndCache(Protocol):
    """Split qkv, normalize q and k (when weights are given), rotate both, write k and v into the cache; return q.

    qkv        [T, (Hq + kv_parts Hkv) * D], see AttentionShape
    cos_sin    None (this layer has no positions), or [max_position, rotary_dim] float32: cos in the first half, sin
               in the second; the first rotary_dim elements of each head rotate, in pairs as shape.interleaved says
    q_norm, k_norm  None, or float32 RMSNorm weights, [D] (over each head) or [Hq * D], [Hkv * D] (over all heads)
    returns    q [T, Hq, D]
    """

    def __call__(
        self,
        qkv: Tensor,
        step: StepInputs,
        cache: LayerCache,
        shape: AttentionShape,
        cos_sin: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        /,
    ) -> Tensor: ...


class PagedAttention(Protocol):
    """q [T, Hq, D] -> [T, Hq * D]: causal over the cache, which holds this step's own keys and values already."""

    def __call__(self, q: Tensor, step: StepInputs, cache: LayerCache, shape: AttentionShape, /) -> Tensor: ...


class RopeAndAttention(Protocol):
    """RopeAndCache, and PagedAttention of what it returns: [T, Hq * D]. Quantized in decode steps alone."""

    def __call__(
        self,
        qkv: Tensor,
        step: StepInputs,
        cache: LayerCache,
        shape: AttentionShape,
        cos_sin: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        input_quant: ActivationQuant | None = None,
        /,
    ) -> Hidden: ...


HadamardBody = Callable[[Tensor, int], Tensor]
"""Rows [T, K] times a Hadamard matrix in blocks of so many columns, perhaps in their place."""


def only_rank(x: Tensor) -> Tensor:
    """`Ops.of_driver` of an engine with one rank."""
    return x


@dataclass(frozen=True)
class Ops:
    """One body for each operator; `name` says whose they are, in the table at start.

    compiles_kernels  bodies are compiled at their first use, by the sizes of a step
    recordable        bodies launch the same kernels in all decode steps of a size (kernels/native/recording.py)
    batch_invariant   a token's results have the same bits whatever else is in the step, and however its sequence's
                      tokens are divided into steps; tests/kernels/test_batch_invariant.py proves it
    invariant         the bodies that are so, on the same device; None: none are known
    latent            attention over latents (kernels/attention/latent.py); None: the device has none
    gated_delta       the gated delta rule (kernels/linear_attention/gated_delta.py); None: the device has none
    mamba2_decode, short_conv_decode  of one token of each sequence (kernels/linear_attention/); None: torch does it
    of_driver         what the first of the ranks that divide the layers has, [N, W], on each of them
    hadamard      of inputs that are rotated while serving (kernels/hadamard/); None: the device has none
    """

    name: str
    embed: Embed
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    silu_and_mul: GatedActivation
    gelu_tanh_and_mul: GatedActivation
    rope_and_attention: RopeAndAttention
    clamped_swiglu: ClampedSwiglu = norm_reference.clamped_swiglu
    of_driver: Callable[[Tensor], Tensor] = only_rank
    compiles_kernels: bool = False
    recordable: bool = False
    batch_invariant: bool = False
    invariant: Ops | None = None
    latent: LatentBody | None = None
    gated_delta: GatedDeltaBody | None = None
    mamba2_decode: Mamba2Body | None = None
    short_conv_decode: ShortConvDecode | None = None
    hadamard: HadamardBody | None = None


def one_after_the_other(rope_and_cache: RopeAndCache, attention: PagedAttention) -> RopeAndAttention:
    """RopeAndAttention of the two."""

    def rope_and_attention(
        qkv: Tensor,
        step: StepInputs,
        cache: LayerCache,
        shape: AttentionShape,
        cos_sin: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        input_quant: ActivationQuant | None = None,
    ) -> Tensor:
        refuse_input_quant(input_quant)
        q = rope_and_cache(qkv, step, cache, shape, cos_sin, q_norm, k_norm, eps)
        if shape.query_scale is not None:
            q = q * shape.query_scale.of(step.positions).to(q.dtype).view(-1, 1, 1)
        return attention(q, step, cache, shape)

    return rope_and_attention


REFERENCE = Ops(
    name="reference",
    embed=norm_reference.embed,
    rms_norm=norm_reference.rms_norm,
    add_rms_norm=norm_reference.add_rms_norm,
    silu_and_mul=norm_reference.silu_and_mul,
    gelu_tanh_and_mul=norm_reference.gelu_tanh_and_mul,
    rope_and_attention=one_after_the_other(attention_reference.rope_and_cache, attention_reference.paged_attention),
    latent=LatentBody(write_latents, attention_reference.paged_attention),
    gated_delta=gated_delta_reference.gated_delta,
    hadamard=hadamard_rows,
)
