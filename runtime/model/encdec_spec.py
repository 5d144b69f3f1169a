"""The features of one encoder-decoder of text, as a value read from its config.json; the counterpart of `DecoderSpec`.

Whatever changes the computation and isn't known here is refused by its name.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.runtime.model.config_types import Count, Index, ModelConfigError, Positive, check_types, config_struct
from octavo.runtime.model.encoder_spec import EncoderActivation, activation_of
from octavo.runtime.model.families.registry import ENCODER_DECODERS
from octavo.runtime.model.families.translating import EncDecArchitecture, EncDecNames, Stack
from octavo.runtime.model.spec import UnsupportedModelError, stored_dtype

NORM_EPS = 1e-5  # torch's own default for LayerNorm, where no key says it; of Whisper's, too


@dataclass(frozen=True)
class StackSpec:
    """The encoder's layers, or the decoder's."""

    num_layers: int
    num_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class EncDecSpec:
    """An encoder over a text's tokens, and a decoder with attention to its output; one embedding serves both.

    row            what its family says
    max_position   of a text, on either side, as the config says
    padding        the token that no text may have, since it has no position in one; None: there is no such token
    scale          what scores are multiplied by
    embedding_factor, head_factor  what embeddings, and logits, are multiplied by
    num_buckets    of the bias by distance, and the distance at which they end; 0: there is none
    dtype          the type that the config names, or None
    """

    architecture: str
    row: EncDecArchitecture
    vocab_size: int
    hidden_size: int
    head_dim: int
    encoder: StackSpec
    decoder: StackSpec
    max_position: int
    padding: int | None
    activation: EncoderActivation
    gated: bool
    norm_eps: float
    scale: float
    embedding_factor: float
    head_factor: float
    num_buckets: int
    farthest: int
    dtype: str | None = None

    @property
    def names(self) -> EncDecNames:
        """Of its modules."""
        return self.row.names

    def modules(self, stack: Stack, index: int) -> dict[str, tuple[str, ...]]:
        """The checkpoint's modules of each linear layer of one layer, by the linear layer's name in it."""
        names = self.names
        layer = names.layer.format(stack, index)
        q, k, v, o = names.projections
        found = {"qkv": (q, k, v), "o": (o,)}
        found = {kind: tuple(f"{layer}{names.own}{name}" for name in parts) for kind, parts in found.items()}
        if stack == "decoder":
            cross = {"cross_q": (q,), "cross_kv": (k, v), "cross_o": (o,)}
            found |= {kind: tuple(f"{layer}{names.cross}{name}" for name in parts) for kind, parts in cross.items()}
        first = {"gate_up": names.gated_up} if self.gated else {"up": names.up}
        mlp = first | {"down": (names.down,)}
        return found | {
            kind: tuple(f"{layer}{names.mlp(stack)}{name}" for name in parts) for kind, parts in mlp.items()
        }

    @property
    def width(self) -> int:
        """Of all heads of the decoder's keys, or values."""
        return self.decoder.num_heads * self.head_dim

    @property
    def first_position(self) -> int:
        """The row of the position tables, or the position of the sines, that a text's first token has."""
        return self.row.first_position if self.padding is None else self.padding + 1

    @property
    def bounds_positions(self) -> bool:
        """Whether no longer text than `max_position` can be computed."""
        return bool(self.names.positions)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> EncDecSpec:
        """Read a config.json; raises UnsupportedModelError on what isn't known, ModelConfigError on what can't be."""
        name = str(config.get("model_type"))
        if name not in ENCODER_DECODERS:
            raise UnsupportedModelError(
                f"model_type {name!r} is no encoder-decoder of text here; known are {', '.join(ENCODER_DECODERS)}"
            )
        row = ENCODER_DECODERS[name]
        classes = config.get("architectures") or []
        if classes and classes[0] not in row.classes:
            raise UnsupportedModelError(f"architecture {classes[0]!r} writes no texts; {row.classes[0]} does")
        types: dict[str, Any] = {key: _TYPES.get(size, Count) for size, keys in row.keys.items() for key in keys}
        check_types(config, config_struct({**types, row.activation: str, "pad_token_id": Index}))
        check_neutral(row.neutral, config, name)
        settings = ChainMap({key: value for key, value in config.items() if value is not None}, dict(row.defaults))
        sizes = {size: _size(settings, keys, name) for size, keys in row.keys.items()}
        hidden = sizes["hidden_size"]
        head_dim = sizes.get("head_dim") or hidden // sizes["decoder_heads"]
        _check_heads(row, sizes, head_dim)
        _check_buckets(row, sizes)
        kind = str(settings[row.activation])
        gated = bool(row.names.gated_up) and kind.startswith("gated-")
        if gated:  # its GELU is the tanh approximation, as its first code had it
            kind = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
        scales_embedding = bool(row.scale_embedding and settings.get(row.scale_embedding))
        return cls(
            architecture=name,
            row=row,
            vocab_size=_size(settings, ("vocab_size",), name),
            hidden_size=hidden,
            head_dim=head_dim,
            encoder=StackSpec(sizes["encoder_layers"], sizes["encoder_heads"], sizes["encoder_inner"]),
            decoder=StackSpec(sizes["decoder_layers"], sizes["decoder_heads"], sizes["decoder_inner"]),
            max_position=sizes["max_position"],
            padding=settings["pad_token_id"] if row.sines == "tensor2tensor" else None,
            activation=activation_of(kind),
            gated=gated,
            norm_eps=float(sizes.get("norm_eps", NORM_EPS)),
            scale=head_dim**-0.5 if row.scales else 1.0,
            embedding_factor=hidden**0.5 if scales_embedding else 1.0,
            head_factor=hidden**-0.5 if row.scales_head(config) else 1.0,
            num_buckets=sizes.get("num_buckets", 0),
            farthest=sizes.get("farthest", 0),
            dtype=stored_dtype(config),
        )


_TYPES = {"norm_eps": Positive, "num_buckets": Index}


def check_neutral(neutral: Mapping[str, tuple[Any, ...]], config: Mapping[str, Any], name: str) -> None:
    """Refuse the first of these keys whose value is none of those that leave the computation as it is."""
    for key, values in neutral.items():
        if config.get(key) not in values:
            raise UnsupportedModelError(
                f"{name}: {key} = {config[key]!r} changes the computation in a way that isn't known here"
            )


def _check_buckets(row: EncDecArchitecture, sizes: Mapping[str, Any]) -> None:
    buckets = sizes.get("num_buckets")
    if buckets is not None and not 4 <= buckets < 2 * sizes["farthest"]:
        most = f"twice {row.keys['farthest'][0]}, {sizes['farthest']}"
        raise ModelConfigError(f"config.json: {row.keys['num_buckets'][0]} {buckets} is not between 4 and {most}")


def _size(settings: Mapping[str, Any], keys: tuple[str, ...], name: str) -> Any:
    """The first of these keys that is there, of whose type `check_types` has made sure."""
    key = next((key for key in keys if key in settings), None)
    if key is None:
        raise ModelConfigError(f"config.json has no {keys[0]}, which {name} needs")
    return settings[key]


def _check_heads(row: EncDecArchitecture, sizes: Mapping[str, Any], head_dim: int) -> None:
    """Heads of one size in both stacks, together as wide as the hidden states where no key says their size."""
    if "head_dim" in row.keys:
        return
    hidden = sizes["hidden_size"]
    for stack in ("encoder", "decoder"):
        heads = sizes[f"{stack}_heads"]
        if heads * head_dim != hidden:
            raise ModelConfigError(
                f"config.json: {row.keys[f'{stack}_heads'][0]} {heads} times heads of {head_dim} is not d_model "
                f"{hidden}; both stacks have heads of one size here"
            )
