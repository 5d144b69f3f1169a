"""Mixers whose memory of a sequence is a state of fixed size, as values: sizes, and what a checkpoint has of them.

A mixer is one dataclass here, a member of `StateSpec`. It says what the state cache holds for it (`state`), which
linear layers it has (`linears`), what else (`tensors`, and `gates`: small linear layers that are never quantized),
under which module of a layer these are (`owner`), and which norm's channels the last linear layer reads (`out_norm`);
whether its body is batch-invariant, too.
A family says which layers have it (`Architecture.state_mixers`), state_weights.py reads it, and `DecoderBuilder.layer`
builds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from octavo.kernels.linear_attention.gated_delta import GatedDeltaShape
from octavo.kernels.linear_attention.kimi_delta import KimiDeltaShape
from octavo.kernels.linear_attention.mamba2 import Mamba2Shape
from octavo.kernels.linear_attention.states import StateShape

Linears = dict[str, tuple[dict[str, int], int]]
"""By the names of `DecoderLayer.linears`, in the order of computing: rows of each module, and the columns of all."""


class WithoutKeys:
    """What `AttentionSpec` says of a layer, of one that has no keys and values; and no gates."""

    window: ClassVar[None] = None
    rope: ClassVar[None] = None
    query_scale: ClassVar[None] = None
    source: ClassVar[None] = None
    num_kv_heads: ClassVar[int] = 0
    head_dim: ClassVar[int] = 0

    @property
    def gates(self) -> dict[str, int]:
        """Modules and their rows, all of which read the layer's input."""
        return {}


@dataclass(frozen=True)
class GatedDeltaSpec(WithoutKeys):
    """The gated delta rule (kernels/linear_attention/gated_delta.py).

    Checkpoints whose shape is `interleaved` have one module for queries, keys, values and z, and one for both gates;
    others have several.
    """

    shape: GatedDeltaShape
    owner: ClassVar[str] = "linear_attn"
    title: ClassVar[str] = "the gated delta rule"
    batch_invariant: ClassVar[bool] = True
    out_norm: ClassVar[str | None] = None  # its norm is one for all heads

    @property
    def state(self) -> StateShape:
        return self.shape.state

    def linears(self, hidden_size: int) -> Linears:
        shape = self.shape
        qkv = 2 * shape.keys + shape.values
        first = {"in_proj_qkv": qkv, "in_proj_z": shape.values}
        if shape.interleaved:
            first = {"in_proj_qkvz": qkv + shape.values}
        return {"qkvz": (first, hidden_size), "out": ({"out_proj": hidden_size}, shape.values)}

    @property
    def gates(self) -> dict[str, int]:
        heads = self.shape.num_value_heads
        return {"in_proj_ba": 2 * heads} if self.shape.interleaved else {"in_proj_b": heads, "in_proj_a": heads}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        heads = (self.shape.num_value_heads,)
        return {
            "conv1d.weight": (self.shape.channels, 1, self.shape.taps),
            "dt_bias": heads,
            "A_log": heads,
            "norm.weight": (self.shape.value_dim,),
        }


@dataclass(frozen=True)
class Mamba2Spec(WithoutKeys):
    """Mamba 2's state space (kernels/linear_attention/mamba2.py), between two linear layers.

    factors  of z, x, B, C and dt, as the first linear layer gives them; (): none is multiplied
    """

    shape: Mamba2Shape
    has_conv_bias: bool
    has_norm: bool = True
    factors: tuple[float, ...] = ()
    owner: str = "mamba"
    title: ClassVar[str] = "Mamba 2's state space"
    batch_invariant: ClassVar[bool] = False  # a chunk of tokens begins where a step does

    @property
    def out_norm(self) -> str | None:
        return "norm" if self.has_norm else None

    @property
    def state(self) -> StateShape:
        return self.shape.state

    def linears(self, hidden_size: int) -> Linears:
        first = {"in_proj": sum(self.shape.columns)}
        return {"in": (first, hidden_size), "out": ({"out_proj": hidden_size}, self.shape.inner)}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        heads = (self.shape.num_heads,)
        bias = {"conv1d.bias": (self.shape.channels,)} if self.has_conv_bias else {}
        norm = {"norm.weight": (self.shape.inner,)} if self.has_norm else {}
        return {
            "conv1d.weight": (self.shape.channels, 1, self.shape.taps),
            **bias,
            "dt_bias": heads,
            "A_log": heads,
            "D": heads,
            **norm,
        }


@dataclass(frozen=True)
class ShortConvSpec(WithoutKeys):
    """A short convolution between two gates (kernels/linear_attention/short_conv.py) and two linear layers."""

    channels: int
    taps: int
    owner: ClassVar[str] = "conv"
    title: ClassVar[str] = "a short convolution"
    batch_invariant: ClassVar[bool] = False  # as far as it is known
    out_norm: ClassVar[str | None] = None

    @property
    def state(self) -> StateShape:
        return StateShape(((self.taps - 1, self.channels),))

    def linears(self, hidden_size: int) -> Linears:
        return {"in": ({"in_proj": 3 * self.channels}, hidden_size), "out": ({"out_proj": hidden_size}, self.channels)}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {"conv.weight": (self.channels, 1, self.taps)}


@dataclass(frozen=True)
class KimiDeltaSpec(WithoutKeys):
    """Kimi's delta attention (kernels/linear_attention/kimi_delta.py)."""

    shape: KimiDeltaShape
    owner: ClassVar[str] = "self_attn"
    title: ClassVar[str] = "Kimi's delta attention"
    batch_invariant: ClassVar[bool] = False  # a chunk of tokens begins where a step does
    out_norm: ClassVar[str | None] = None  # its norm is one for all heads

    @property
    def state(self) -> StateShape:
        return self.shape.state

    def linears(self, hidden_size: int) -> Linears:
        inner = self.shape.inner
        first = {"q_proj": inner, "k_proj": inner, "v_proj": inner}
        return {"qkv": (first, hidden_size), "out": ({"o_proj": hidden_size}, inner)}

    @property
    def gates(self) -> dict[str, int]:
        return dict(zip(("b_proj", "f_a_proj", "g_a_proj"), self.shape.gates, strict=True))

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        shape = self.shape
        convs = {f"{kind}_conv1d.weight": (shape.inner, 1, shape.taps) for kind in "qkv"}
        return convs | {
            "A_log": (1, 1, shape.num_heads, 1),
            "dt_bias": (shape.inner,),
            "f_b_proj.weight": (shape.inner, shape.head_dim),
            "g_b_proj.weight": (shape.inner, shape.head_dim),
            "o_norm.weight": (shape.head_dim,),
        }


StateSpec = GatedDeltaSpec | Mamba2Spec | ShortConvSpec | KimiDeltaSpec
"""All of them."""


@dataclass(frozen=True)
class BesideSpec:
    """A mixer with a state that stands beside a layer's attention, and reads what that reads.

    factor, attention_factor  of the two outputs, which are added then
    """

    mixer: Mamba2Spec
    factor: float
    attention_factor: float
