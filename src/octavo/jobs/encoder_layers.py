"""Which layers of an encoder stay as they are, so that the others' rounding leaves embeddings where they were.

Inputs of a few layers have channels far larger than the others, and rounding them costs most of the cosine. What a
layer costs by itself is measured, and hardly depends on the others: those that cost most for their size are left out,
one by one, until what is left measures as well as it should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.recipe import Recipe
from octavo.jobs.embedding_quality import NUM_TEXTS, held_out_texts, vectors_of
from octavo.quant.linear import Linear, make_linear
from octavo.quant.qparams import quantize_weight
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.encoder import Encoder, EncoderLayer
from octavo.runtime.model.weights import load_model
from octavo.text.tokenizer import Tokenizer

LEAST = 0.999  # of the mean cosine, to the embeddings of the original in float32
MARGIN = 0.0001  # above it, for texts that aren't those which are measured
NUM_MEASURED = 15  # texts


@dataclass(frozen=True)
class KeptLayers:
    """patterns: of the layers that are left as they are, for a recipe's `ignore`; note: what a person should know."""

    patterns: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class _Place:
    """A linear layer of an encoder: its layer, its name there, and the patterns of its modules."""

    layer: int
    name: str
    patterns: tuple[str, ...]


def is_searched(recipe: Recipe) -> bool:
    """Whether layers are to be left out by themselves: of 8 bits with rounded inputs, where a user names none."""
    scheme = recipe.default
    return scheme.activation is not None and scheme.weight.bits == 8 and not recipe.layers and not recipe.ignore


@torch.inference_mode()
def layers_to_keep(directory: Path, recipe: Recipe, progress: Callable[[float, float, str], None]) -> KeptLayers | None:
    """The layers that must stay for a mean cosine of LEAST; None: none must. Raises ValueError for no encoder."""
    model = load_model(EngineConfig(model=str(directory), dtype="float32"))
    if not isinstance(model, Encoder):
        raise ValueError(f"{directory} is no encoder")
    tokenizer = Tokenizer.open(directory)
    texts = held_out_texts()[:: NUM_TEXTS // NUM_MEASURED]
    truth = vectors_of(model, texts, tokenizer)

    linears: dict[_Place, Linear] = {}  # as they are rounded

    def loss(places: Iterable[_Place]) -> float:
        """1 - the mean cosine with these layers rounded."""
        found = vectors_of(_with_linears(model, {place: linears[place] for place in places}), texts, tokenizer)
        return 1 - float(torch.cosine_similarity(truth, found).mean())

    places = list(_places(model))
    costs = {}
    for done, place in enumerate(places):
        progress(done, len(places), "layers")
        linear = model.stack.layers[place.layer].linears()[place.name]
        linears[place] = _round(linear, recipe, model.device)
        costs[place] = loss([place]) / linear.weight_bytes
    rounded = sorted(places, key=costs.__getitem__)  # those that cost least for their size first
    while rounded and loss(rounded) > 1 - LEAST - MARGIN:
        rounded.pop()
    kept = [place for place in places if place not in rounded]
    if not kept:
        return None
    names = ", ".join(f"{place.layer}.{place.name}" for place in kept)
    note = (
        f"{len(kept)} of {len(places)} linear layers stay as they are, for a mean cosine of {LEAST}: {names}; --ignore "
        "chooses them instead, and --ignore lm_head leaves none"
    )
    return KeptLayers(tuple(pattern for place in kept for pattern in place.patterns), note)


def _places(model: Encoder) -> Iterable[_Place]:
    names = model.spec.row.names
    modules = {"qkv": names.qkv, "o": (names.o,), "up": names.up, "gate_up": names.up, "down": (names.down,)}
    for index, layer in enumerate(model.stack.layers):
        for name in layer.linears():
            yield _Place(index, name, tuple(f"*{names.layer.format(index)}{module}" for module in modules[name]))


def _with_linears(model: Encoder, linears: Mapping[_Place, Linear]) -> Encoder:
    """The encoder with other linear layers in some places."""
    layers = list(model.stack.layers)
    for place, linear in linears.items():
        layers[place.layer] = _with(layers[place.layer], place.name, linear)
    return replace(model, stack=replace(model.stack, layers=layers))


def _round(linear: Linear, recipe: Recipe, device: torch.device) -> Linear:
    """A linear layer rounded as the recipe has it."""
    weight: Tensor = torch.cat([part.weight.unpack() for part in linear.parts])
    scheme = recipe.default
    codes = quantize_weight(weight, scheme, recipe.search_of(scheme))
    return make_linear([codes], [linear.whole_bias], Target.of(device, torch.float32))


def _with(layer: EncoderLayer, name: str, linear: Linear) -> EncoderLayer:
    changed: Any = {name: linear}
    if name in ("qkv", "o"):
        return replace(layer, attention=replace(layer.attention, **changed))
    mlp: Any = layer.mlp
    return replace(layer, mlp=replace(mlp, **changed))
