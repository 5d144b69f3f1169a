"""How many rows the state caches of a model have: one for each sequence that may run, and others for snapshots."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.kernels.linear_attention.states import StateShape
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.model import Model

SLOTS_SHARE = 2  # of the cache's memory a half at most is for the states of sequences that run
SNAPSHOTS_SHARE = 4  # and a quarter for snapshots
MOST_SNAPSHOTS = 8  # for each sequence that may run


@dataclass(frozen=True)
class StatePlan:
    """row_bytes: of a sequence's states in all layers; 0: the model has none."""

    num_slots: int
    num_snapshots: int
    row_bytes: int

    @property
    def num_rows(self) -> int:
        return self.num_slots + self.num_snapshots

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


def plan_states(model: Model, config: EngineConfig, budget: int, notes: list[str]) -> StatePlan:
    """Rows within the memory that the whole cache has. Raises ValueError where it doesn't hold one sequence's."""
    row = sum(shape.num_bytes for shape in model.kv_shapes if isinstance(shape, StateShape))
    if row == 0:
        return StatePlan(config.max_num_seqs, 0, 0)
    slots = min(config.max_num_seqs, budget // SLOTS_SHARE // row)
    if slots == 0:
        raise ValueError(
            f"the states of one sequence take {row / 1e6:,.1f} MB, and half of the cache's {budget / 1e6:,.1f} MB is "
            f"for states; --kv-cache-memory-bytes {SLOTS_SHARE * row} or more works"
        )
    if slots < config.max_num_seqs:
        notes.append(
            f"{slots} sequences run at once, not {config.max_num_seqs}: the states of each take {row / 1e6:,.1f} MB; "
            "--kv-cache-memory-bytes makes room for more"
        )
    snapshots = 0
    if config.enable_prefix_caching:
        snapshots = min(MOST_SNAPSHOTS * slots, budget // SNAPSHOTS_SHARE // row)
    return StatePlan(slots, snapshots, row)
