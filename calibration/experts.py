"""Warns of experts that the router hardly chose for the calibration text.

Every expert's statistics are over all tokens (runtime/model/blocks.py), so a rare one is still calibrated, but on
inputs that it was not chosen for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RARE = 0.1  # of an even share of the tokens


def rarely_chosen(counts: Sequence[int]) -> list[int]:
    """A block's experts that got less than a tenth of an even share of the tokens."""
    return [i for i, count in enumerate(counts) if count * len(counts) < RARE * sum(counts)]


def expert_of(name: str) -> int | None:
    """The expert that a linear layer is of, by its name in the block: 3 of 'experts.3.down'; None: no expert's."""
    owner, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if owner == "experts" else None


def cautious(rare: Sequence[str]) -> str:
    """A note of experts that the text says too little of for a budget to take bits from: 'model.layers.0.experts.3'."""
    layers: dict[str, list[str]] = {}
    for name in rare:
        layer, _, expert = name.rpartition(".")
        layers.setdefault(layer, []).append(expert)
    named = "; ".join(f"{layer}: {', '.join(numbers)}" for layer, numbers in layers.items())
    return (
        f"{len(rare)} experts were chosen for less than a tenth of an even share of the tokens that sensitivity was "
        f"measured on; they count as others do, and lose no more than by the best single scheme of the budget ({named})"
    )


def rare_experts(counts: Mapping[str, Sequence[int]], *, tunes: bool = False) -> list[str]:
    """A warning for the blocks with experts that got less than a tenth of an even share; counts by block's name."""
    rare = {block: found for block, chosen in counts.items() if (found := rarely_chosen(chosen))}
    if not rare:
        return []
    total = sum(len(chosen) for chosen in counts.values())
    blocks = "; ".join(f"{block}: {', '.join(map(str, found))}" for block, found in rare.items())
    return [
        f"{sum(map(len, rare.values()))} of {total} experts were chosen for less than a tenth of an even share of the "
        f"calibration tokens, and were calibrated on inputs that the router sends elsewhere"
        f"{' and not tuned' if tunes else ''} ({blocks}); more samples, or text like what will be served, reach them"
    ]
