"""Warns of experts that the router hardly chose for the calibration text.

Every expert's statistics are over all tokens (runtime/model/blocks.py), so a rare one is still calibrated, but on
inputs that it was not chosen for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RARE = 0.1  # of an even share of the tokens


def rare_experts(counts: Mapping[str, Sequence[int]]) -> list[str]:
    """A warning for the blocks with experts that got less than a tenth of an even share; counts by block's name."""
    rare = {
        block: found
        for block, chosen in counts.items()
        if (found := [i for i, count in enumerate(chosen) if count * len(chosen) < RARE * sum(chosen)])
    }
    if not rare:
        return []
    total = sum(len(chosen) for chosen in counts.values())
    blocks = "; ".join(f"{block}: {', '.join(map(str, found))}" for block, found in rare.items())
    return [
        f"{sum(map(len, rare.values()))} of {total} experts were chosen for less than a tenth of an even share of the "
        f"calibration tokens, and were calibrated on inputs that the router sends elsewhere ({blocks}); more samples, "
        "or text like what will be served, reach them"
    ]
