"""Which token uses which adapter, as the kernels read it: tokens sorted by slot."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.integer[Any]]


class AdapterRows(NamedTuple):
    """The tokens of a step by the slot of their adapter. With T tokens and S slots:

    rows    [T] int64: the tokens of slot 0, then those of slot 1, and so on; behind them the tokens without an adapter
    starts  [S + 1] int64: slot s has tokens rows[starts[s] : starts[s + 1]]
    """

    rows: Tensor
    starts: Tensor

    def among(self, tokens: Tensor) -> AdapterRows:
        """The same for some of the tokens, [L] int64, which are numbered anew in this order."""
        slots = np.full(len(self.rows), -1)
        starts = self.starts.cpu().numpy()
        slots[self.rows.cpu().numpy()[: starts[-1]]] = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        return sort_by_slot(slots[tokens.cpu().numpy()], len(starts) - 1)


def sort_by_slot(slots: Integers, num_slots: int) -> AdapterRows:
    """slots [T]: the slot of each token's adapter, -1 where it has none."""
    has_none = np.where(slots < 0, num_slots, slots)
    rows = np.argsort(has_none, kind="stable")
    starts = np.searchsorted(has_none[rows], np.arange(num_slots + 1))
    return AdapterRows(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(starts.astype(np.int64)))
