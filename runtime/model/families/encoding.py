"""What a family of encoders says about itself; the counterpart of `family.Architecture`.

A row is read off transformers' modeling_*.py and configuration_*.py, or the code that a checkpoint brought along before
transformers had it. `EncoderSpec.from_hf` combines it with a checkpoint's config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class EncoderNames:
    """The modules of a checkpoint, behind the model's prefix; those of a layer behind `layer`, its number in `{}`.

    qkv   one module of all three, or three
    up    one module; of a gated MLP one of both halves, or (gate, up)
    attention_norm  behind attention's sum, or before attention. Empty names: there is no such module
    """

    word: str
    norm: str
    layer: str
    qkv: tuple[str, ...]
    o: str
    attention_norm: str
    up: tuple[str, ...]
    down: str
    mlp_norm: str
    positions: str = ""
    types: str = ""
    final_norm: str = ""
    relative_bias: str = ""


@dataclass(frozen=True)
class HeadStep:
    """One linear layer of a classifier, and what follows it.

    module      by its full name; `{}` stands for the model's prefix
    activation  a name in `encoder.ACTIVATIONS`, or `config:KEY`; empty: none
    norm        a LayerNorm's module behind that, or none
    """

    module: str
    activation: str = ""
    norm: str = ""


POOLED_HEAD = (HeadStep("{}pooler.dense", "tanh"), HeadStep("classifier"))  # BERT's own, of sequences


@dataclass(frozen=True)
class EncoderArchitecture:
    """One model_type.

    prefixes     what may stand before the model's modules: nothing, or the name under which a model with a head has it
    keys         its own names of config keys, and the common ones that they mean
    defaults     what common keys mean where they are absent
    neutral      keys that change the computation, and the values that leave it as it is here
    norms        post: behind each sum. pre: before attention and the MLP
    skips_first_norm  the first layer has no norm before its attention
    gated        the MLP is down(act(gate(x)) * up(x))
    gate_is_last of one module of both halves, the gate is the second one
    qkv_bias, o_bias, up_bias, down_bias, norm_bias  whether there is one, or the config key that says it
    first_position  the row of the position table that a text's first token has
    ropes        of each layer the (theta, rope dictionary), by the config and the layer's number; None: no rotation
    window       of each layer how far a token sees on either side, likewise; None: all
    sequence_head, token_head  the classifiers of *ForSequenceClassification and *ForTokenClassification
    pools_config the config key that names the classifier's pooling, or none: the first token's
    unused       beginnings of tensors that a model without its head doesn't need
    """

    names: EncoderNames
    prefixes: tuple[str, ...]
    defaults: Settings
    sequence_head: tuple[HeadStep, ...]
    token_head: tuple[HeadStep, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    norms: Literal["post", "pre"] = "post"
    skips_first_norm: bool = False
    gated: bool = False
    gate_is_last: bool = False
    qkv_bias: bool | str = True
    o_bias: bool | str = True
    up_bias: bool | str = True
    down_bias: bool | str = True
    norm_bias: bool | str = True
    first_position: Callable[[Settings], int] = lambda _: 0
    ropes: Callable[[Settings, int], tuple[float, dict[str, Any]]] | None = None
    window: Callable[[Settings, int], int | None] = lambda _settings, _layer: None
    pools_config: str = ""
    unused: tuple[str, ...] = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")
