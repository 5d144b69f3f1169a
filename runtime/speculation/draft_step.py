"""Steps that make drafts: what is new of some sequences, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np

from octavo.kernels.attention.step import Integers, StepInputs


def draft_step(
    ends: Rows[int],
    tokens: Rows[Rows[int]],
    blocks: Rows[Rows[int]],
    block_size: int,
    logits_index: Integers | None = None,
) -> StepInputs:
    """A step of each sequence's new tokens, the last of which stands right before its end.

    blocks: of each sequence, those up to its end, and others behind them. logits_index: as in StepInputs.prefill.
    """
    tables = np.zeros((len(blocks), -(-max(ends) // block_size)), np.int32)
    for row, given in zip(tables, blocks, strict=True):
        row[: len(given)] = given[: len(row)]
    return StepInputs.prefill(
        ends,
        block_size,
        sizes=[len(new) for new in tokens],
        token_ids=[token for new in tokens for token in new],
        tables=tables,
        logits_index=logits_index,
    )
