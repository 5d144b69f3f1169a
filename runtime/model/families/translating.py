"""What a family of encoder-decoders of text says about itself; the counterpart of `family.Architecture`.

A row is read off transformers' modeling_*.py and configuration_*.py. `EncDecSpec.from_hf` combines it with a
checkpoint's config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Config = Mapping[str, Any]
Stack = Literal["encoder", "decoder"]
Sines = Literal["tensor2tensor", "paper"]


@dataclass(frozen=True)
class EncDecNames:
    """The modules of a checkpoint. `{}` stands for `encoder` or `decoder`, and in `layer` also for the layer's number.

    words       the embedding, which both share; copies: other names that some writers store it under as well
    own, cross  what owns a layer's attention to itself and to the source; projections: q, k, v and o of either
    encoder_mlp, decoder_mlp  what stands before the names of an MLP and its norm in a layer
    up, gated_up  an MLP's first module, and the gate's and up's of a gated one; (): there is none of that kind
    head        stored where it isn't the embedding. head_bias: a tensor [1, V] that is added to logits, if it is there
    distances   of a layer, the bias by distance; all of these: of the first layer alone, but for `each_layer`
    unused      tensors that some writers store and nothing needs. Empty names: there is no such module
    """

    words: str
    copies: tuple[str, ...]
    layer: str
    own: str
    cross: str
    projections: tuple[str, str, str, str]
    attention_norm: str
    cross_norm: str
    encoder_mlp: str
    decoder_mlp: str
    up: tuple[str, ...]
    down: str
    mlp_norm: str
    gated_up: tuple[str, ...] = ()
    final_norm: str = ""
    positions: str = ""
    embedding_norm: str = ""
    distances: str = ""
    head: str = "lm_head"
    head_bias: str = ""
    unused: tuple[str, ...] = ()

    def mlp(self, stack: Stack) -> str:
        return self.encoder_mlp if stack == "encoder" else self.decoder_mlp


@dataclass(frozen=True)
class EncDecArchitecture:
    """One model_type.

    classes      `architectures` that write texts; another one is refused
    keys         the config keys of each size, of which the first that is there counts
    defaults     what keys mean that are absent
    neutral      keys that change the computation, and the values that leave it as it is here
    norm         rms: RMSNorm. layer: LayerNorm
    norms        pre: before each sublayer. post: behind each sum
    has_bias     linear layers have one
    scales       scores are divided by the root of the head's size
    activation   the key that names it; `gated-` in front of a name: the MLP is down(act(gate(x)) * up(x))
    scale_embedding  the key that says whether embeddings are multiplied by the root of the hidden size; empty: they
                 aren't
    first_position  the row of the position tables, or the position of the sines, that a text's first token has
    sines        positions are sines and cosines. tensor2tensor: its frequencies, and no checkpoint has them; they begin
                 behind the padding token's id. paper: those of arXiv 1706.03762, where the checkpoint has no table
    each_layer   each layer has a bias by distance of its own; else all have the first one's
    scales_head  whether logits are divided by the root of the hidden size
    """

    names: EncDecNames
    classes: tuple[str, ...]
    keys: Mapping[str, tuple[str, ...]]
    defaults: Config
    norm: Literal["rms", "layer"]
    norms: Literal["pre", "post"]
    has_bias: bool
    scales: bool
    activation: str
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    scale_embedding: str = ""
    first_position: int = 0
    sines: Sines | None = None
    each_layer: bool = False
    scales_head: Callable[[Config], bool] = lambda _: False
