"""What an engine that generates nothing makes of a step: out of hidden states, what its pooled requests asked for.

It stands where a sampler does. A text whose rows are all wanted may come in several chunks, whose rows are kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.sampling.best import Best
from octavo.runtime.messages import Pooled, PoolingParams
from octavo.runtime.model.pooling import Pooler
from octavo.runtime.scheduling.plan import ScheduledSequence, StepPlan, StepResult

BAD_HIDDEN = "the model's hidden states for this request are not finite numbers (NaN or infinity): they mean nothing"


class PooledSteps:
    """Plans come in the order of their steps, each when its hidden states are there."""

    def __init__(self, pooler: Pooler, max_num_seqs: int) -> None:
        self.last_tokens = np.zeros(max_num_seqs, dtype=np.int32)  # no plan refers to one
        self._pooler = pooler
        self._rows: dict[int, list[Tensor]] = {}  # of texts that are not complete, by slot

    def has_ended(self, it: ScheduledSequence) -> bool:  # noqa: ARG002
        """No sequence goes on."""
        return False

    def sample(self, hidden: Tensor | Best, plan: StepPlan) -> StepResult:
        """hidden [L, H], of which L = the plan's wanted rows."""
        assert isinstance(hidden, Tensor)
        places: list[int] = []
        texts: list[Tensor] = []
        counts = [it.end - it.first_logit for it in plan.scheduled]
        for place, (it, rows) in enumerate(zip(plan.scheduled, torch.split(hidden, counts), strict=True)):
            kept = self._rows.pop(it.slot, [])
            before = [] if it.is_new else kept
            if it.wants == "pooled":
                places.append(place)
                texts.append(torch.cat([*before, rows]) if before else rows)
            elif len(rows):
                self._rows[it.slot] = [*before, rows]
        params = [cast("PoolingParams", plan.scheduled[place].sequence.pooling) for place in places]
        found = dict(zip(places, self._pooler.pool(texts, params), strict=True))
        bad = {place: BAD_HIDDEN for place, vector in found.items() if not torch.isfinite(vector).all()}
        pooled = {place: _sent(vector) for place, vector in found.items() if place not in bad}
        return StepResult([[] for _ in plan.scheduled], errors=bad, pooled=pooled)


def _sent(vector: Tensor) -> Pooled:
    return Pooled(vector.contiguous().numpy().astype("<f4", copy=False).tobytes(), vector.shape[-1])


def with_token_types(inputs: StepInputs, plan: StepPlan) -> StepInputs:
    """The same inputs with the types of the tokens of second texts, where there are any."""
    pairs = [it.sequence.pooling is not None and it.sequence.pooling.second is not None for it in plan.scheduled]
    if not any(pairs):
        return inputs
    types = []
    for it in plan.scheduled:
        second = None if it.sequence.pooling is None else it.sequence.pooling.second
        places = np.arange(it.start, it.end)
        types.append(places >= (it.end if second is None else second))
    return replace(inputs, token_types=torch.from_numpy(np.concatenate(types).astype(np.int64)))
