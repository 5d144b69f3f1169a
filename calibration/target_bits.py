"""Targets of a mixed recipe as bits per weight: a size and a speed are that in other words, and a KL is not.

Speed is that of the roofline: one stream's decoding step takes as long as reading the weights that a token needs, so
that it is as many times as fast as the original's as it reads fewer bytes. Nothing is measured for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from octavo.calibration.cache_choice import NO_CACHE, CacheRoom
from octavo.calibration.candidates import candidates
from octavo.calibration.layers import EXPERT
from octavo.calibration.plan import Plan
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.sensitivity import UNCOUNTED, layer_bits
from octavo.calibration.target import Target, in_gb

HEADER_BYTES = 160  # of a safetensors header, for each tensor, beside its name


def bits_budget(target: Target, plan: Plan, recipe: Recipe, cache: CacheRoom = NO_CACHE) -> float:
    """The bits per weight that the quantized layers and the cache may take for a target that is no KL.

    Raises RecipeError for one that the smallest schemes don't hold, with the nearest that they do.
    """
    items = plan.in_blocks
    is_bits = target.kind == "bits" and cache.streams is None
    schemes = candidates(recipe, target.value if is_bits else 0, target.flag)
    weights = sum(item.spec.numel for item in items)
    least = min(layer_bits(items, recipe, scheme) for scheme in schemes) + cache.least
    counted = "" if cache.streams is None else f" with a KV cache of {cache.streams}"
    match target.kind:
        case "bits":
            numbers = weights + cache.numbers
            most = target.value * numbers
            each = "weight, scales included" if not counted else f"number{counted}, scales included"
            nearest = f"the smallest schemes take {math.ceil(100 * least / numbers) / 100:.2f} bits per {each}"
        case "size":
            rest = _bytes_around(plan, schemes) + (_scale_bytes(plan) if cache.streams is not None else 0)
            most = 8 * (target.value - rest)
            nearest = f"the smallest schemes make {in_gb(math.ceil(rest + least / 8))}{counted}"
        case _:
            before, rest = _bytes_read(plan)
            most = 8 * (before / target.value - rest)
            fastest = math.floor(100 * before / (rest + least / 8)) / 100
            nearest = f"the smallest schemes are {fastest:.2f}x as fast by the roofline"
    if least > most:
        raise RecipeError(f"{target}: {nearest}; a target that they hold works, or a larger group size")
    return most / weights


def _scale_bytes(plan: Plan) -> int:
    """Of the scales of a KV cache, at the most: one a layer, or one for each of up to 256 heads, of keys and values."""
    return sum(2 * (4 * 256 + HEADER_BYTES + len(unit.name) + 20) for unit in plan.units if unit.index is not None)


def _bytes_around(plan: Plan, schemes: Sequence[str]) -> int:
    """Bytes of the weight files beside the counted bits of quantized layers: what stays as it is, and headers."""
    every = [item for unit in plan.units for item in unit.items]
    chosen = {item.name for item in plan.in_blocks}
    scales = [spec for unit in plan.units for spec in unit.scales.values()]
    rest = sum(item.nbytes for item in every if item.name not in chosen) + sum(spec.nbytes for spec in scales)
    for item in every:
        uncounted = [spec.nbytes for name, spec in item.outputs.items() if name.endswith(UNCOUNTED)]
        rest += sum(uncounted) if item.name in chosen else 0
        rest += sum(len(name) + HEADER_BYTES for name in item.outputs)
    return rest + HEADER_BYTES * len(scales) + 64 * len(schemes)


def _bytes_read(plan: Plan) -> tuple[int, int]:
    """Bytes that a token needs of the original, and of them those that stay: not of an embedding beside a head."""
    names = [item.name for unit in plan.units for item in unit.items]
    if any(map(EXPERT.search, names)):
        raise RecipeError(
            "--target-speed counts the weights that a token needs, which of a mixture of experts depends on the token; "
            "--target-size and --bits-budget work"
        )
    has_head = any(name.endswith("lm_head.weight") for name in names)
    unread = ("embed_tokens.weight", "embeddings.weight") if has_head else ()
    read = [item for unit in plan.units for item in unit.items if not (unread and item.name.endswith(unread))]
    chosen = {item.name for item in plan.in_blocks}
    return sum(item.spec.nbytes for item in read), sum(item.nbytes for item in read if item.name not in chosen)
