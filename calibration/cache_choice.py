"""A KV cache's type as a part of a budget: what it takes beside the weights, and what it costs.

The types are those that a checkpoint can ask for, one for all layers: its config has a word for no more, and other
engines take a scale that a layer lacks for 1. Types with scales for each token (int4_per_token_head) are asked for
while serving, and no config has a word for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from octavo.calibration.plan import scaled_heads
from octavo.calibration.prepare import Prepared
from octavo.calibration.recipe import KEEP, Recipe, RecipeError
from octavo.calibration.target import Streams
from octavo.quant.scheme import parse_kv

TYPES = ("fp8", "int8/head", "k=bf16,v=fp8")  # beside the type that the model computes in


@dataclass(frozen=True)
class CacheRoom:
    """The KV cache that streams fill.

    numbers  of keys and values together
    bits     of all of it, by the recipe's `kv_cache` that could be chosen; None: as computed
    streams  None: no cache is counted
    """

    numbers: int = 0
    bits: Mapping[str | None, int] = field(default_factory=lambda: {None: 0})
    streams: Streams | None = None

    @property
    def least(self) -> int:
        return min(self.bits.values())

    def most(self, room: float) -> int:
        """Bits of the largest cache that leaves room for weights, of so many bits in all."""
        return max((bits for bits in self.bits.values() if bits <= room), default=self.least)


NO_CACHE = CacheRoom()


@dataclass(frozen=True)
class CacheChoice:
    """A type that could be chosen: its bits, and the KL that it adds to the model."""

    kv_cache: str | None
    bits: int
    kl: float


WITHOUT_CACHE = (CacheChoice(None, 0, 0.0),)


def cache_types(planned: Prepared, has_latents: bool) -> Sequence[str | None]:
    """What a recipe's `kv_cache` may become: what it is, if it says something; only None where no scales are made."""
    recipe = planned.recipe
    if recipe.kv_cache is not None:
        return (recipe.kv_cache,)
    try:
        scaled_heads(planned.checkpoint)
    except RecipeError:
        return (None,)
    return (None,) if has_latents or recipe.format != "compressed-tensors" else (None, *TYPES)


def cache_bits(kv_cache: str | None, keys: int, values: int, plain: int) -> int:
    """Bits of so many keys and values; plain: of one as computed."""
    if kv_cache is None:
        return plain * (keys + values)
    scheme = parse_kv(kv_cache)
    width = {"bf16": plain, "fp8_e4m3": 8, "int8": 8}
    return keys * width[scheme.key] + values * width[scheme.value]


def cache_alone(recipe: Recipe, kv_cache: str) -> Recipe:
    """The recipe that rounds nothing but keys and values."""
    return msgspec.structs.replace(recipe, layers={"*": KEEP}, kv_cache=kv_cache)
