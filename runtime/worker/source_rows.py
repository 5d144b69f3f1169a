"""What the sequences of a step attend to beside their tokens: an encoder's input, where they begin, and its place.

A sequence's place is its slot, which it has while it runs: one that gives its blocks back and begins again is read
again. The plan has it, and not the order: a model with an encoder runs on one rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.step import NewSource, SourceRows, StepInputs
from octavo.runtime.scheduling.plan import StepPlan
from octavo.runtime.source_messages import AudioSource, Source


def with_sources(inputs: StepInputs, plan: StepPlan, source: Source) -> StepInputs:
    """The same inputs with the sources of the plan's sequences."""
    slots = tuple(it.slot for it in plan.scheduled)
    if isinstance(source, AudioSource):
        lengths = (source.positions,) * len(slots)
        new = [NewSource((it.slot,), _features(it.sequence.features, source)) for it in plan.scheduled if it.is_new]
    else:
        lengths = tuple(len(it.sequence.source_ids) for it in plan.scheduled)
        new = _texts(plan)
    return replace(inputs, sources=SourceRows(slots, lengths, tuple(new)))


def _texts(plan: StepPlan) -> list[NewSource]:
    """Token ids of the texts that sequences begin with; neighbors with the same one, as n answers are, share it."""
    found: list[tuple[list[int], list[int]]] = []
    for it in plan.scheduled:
        if not it.is_new:
            continue
        if found and found[-1][0] == it.sequence.source_ids:
            found[-1][1].append(it.slot)
        else:
            found.append((it.sequence.source_ids, [it.slot]))
    return [NewSource(tuple(slots), torch.tensor(token_ids)) for token_ids, slots in found]


def _features(data: bytes, source: AudioSource) -> Tensor:
    """[rows, length] float32."""
    return torch.from_numpy(np.frombuffer(data, "<f4").reshape(source.rows, source.length).copy())
