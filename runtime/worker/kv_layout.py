"""Which layers share block tables, and with whom each shares its memory: layers with a window apart from the others.

See scheduling/kv_groups.py for what the groups are for. All groups have equally many layers, but for the last ones of a
kind, and for those of a stage, which are as even as they go; layer i of every group lies in the same tensors, block by
block whichever group has the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from octavo.runtime.scheduling.kv_groups import Windows

MOST_PADDING = 1 / 8  # of a block's memory may be unused to have fewer groups, each of which costs time a step


@dataclass(frozen=True)
class KVLayout:
    """layers: of each group, ascending; windows: of each group, see kv_groups.Windows."""

    layers: tuple[tuple[int, ...], ...]
    windows: Windows

    @property
    def depth(self) -> int:
        """Layers of the largest group: so many have memory of their own."""
        return max(len(group) for group in self.layers)

    @cached_property
    def place_of(self) -> dict[int, tuple[int, int]]:
        """Each layer's group, and which of the group's layers it is."""
        return {layer: (group, i) for group, layers in enumerate(self.layers) for i, layer in enumerate(layers)}

    def of_stage(self, begin: int, stop: int) -> KVLayout:
        """Of these layers alone, counted from 0: in as many groups of the same windows, as even as they go.

        So all stages of a model have the same block tables, though some may have no layer in some group.
        """
        layers: list[tuple[int, ...]] = [()] * len(self.windows)
        for window in set(self.windows):
            groups = [group for group, of_group in enumerate(self.windows) if of_group == window]
            of_kind = sorted(layer - begin for group in groups for layer in self.layers[group] if begin <= layer < stop)
            for i, group in enumerate(groups):
                first = i * len(of_kind) // len(groups)
                layers[group] = tuple(of_kind[first : (i + 1) * len(of_kind) // len(groups)])
        return KVLayout(tuple(layers), self.windows)


def one_group(num_layers: int) -> KVLayout:
    """All layers hold all tokens, each in memory of its own."""
    return KVLayout((tuple(range(num_layers)),), (None,))


def choose_layout(windows: Sequence[int | None], longest: int) -> KVLayout:
    """The groups of layers with these windows, for sequences of up to `longest` tokens.

    A window that holds the longest sequence counts as none. Groups are as large as possible, provided that at most an
    eighth of the memory is unused where the last group of each kind is not full.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window if window is not None and window < longest else None, []).append(layer)
    if set(kinds) <= {None}:
        return one_group(len(windows))
    depth = next(
        depth
        for depth in range(min(len(layers) for layers in kinds.values()), 0, -1)
        if _padded(kinds, depth) - len(windows) <= MOST_PADDING * len(windows)
    )
    ordered = sorted(kinds.items(), key=lambda kind: (kind[0] is not None, kind[0] or 0))
    groups = [(window, layers[i : i + depth]) for window, layers in ordered for i in range(0, len(layers), depth)]
    return KVLayout(tuple(tuple(layers) for _, layers in groups), tuple(window for window, _ in groups))


def _padded(kinds: dict[int | None, list[int]], depth: int) -> int:
    """Layers that groups of this depth have memory for."""
    return sum(-(-len(layers) // depth) * depth for layers in kinds.values())
