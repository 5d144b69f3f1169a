"""What differs between the layers of a decoder, and what layers read or write beside one residual stream, as values."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.runtime.model.mixers import Mixer, NoMixer
from octavo.runtime.model.state_mixers import BesideSpec, StateSpec


@dataclass(frozen=True)
class LayerSpec:
    """What differs between layers.

    mixer  NoMixer: it is an MLP alone
    intermediate_size  of a dense MLP
    sparse  the MLP is a choice of experts, DecoderSpec.moe
    sparsity  the share of gates that a dense MLP's activation leaves out
    beside  what stands beside the mixer, which is attention over keys and values then
    has_mlp  else it is a mixer alone
    """

    mixer: Mixer
    intermediate_size: int
    sparse: bool = False
    sparsity: float = 0.0
    beside: BesideSpec | None = None
    has_mlp: bool = True

    @property
    def is_single(self) -> bool:
        """A mixer alone, or an MLP alone, behind one norm."""
        return not self.has_mlp or isinstance(self.mixer, NoMixer)

    @property
    def state(self) -> StateSpec | None:
        """The mixer with a state, if it has one."""
        if self.beside is not None:
            return self.beside.mixer
        return self.mixer if isinstance(self.mixer, StateSpec) else None


@dataclass(frozen=True)
class PerLayerSpec:
    """What each layer reads of a token beside the residual stream (runtime/model/per_layer.py).

    size        numbers of each layer
    vocab_size  rows of the table; tokens behind them have the first row
    of_images   the token whose row images' tokens have
    """

    size: int
    vocab_size: int
    of_images: int = 0


@dataclass(frozen=True)
class StreamSpec:
    """A residual stream of several parts (runtime/model/altup.py).

    active  the part that layers compute
    scales_corrected  it is multiplied by numbers of the layer before it goes through the layer's own input
    laurel_rank  of the linear layers beside attention
    """

    count: int
    active: int
    scales_corrected: bool
    laurel_rank: int
