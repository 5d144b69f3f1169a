"""What the sequences of a step attend to beside their tokens: an encoder's input, where they begin, and its place.

A sequence's place is its slot, which it has while it runs: one that gives its blocks back and begins again is read
again. The plan has it, and not the order: a model with an encoder runs on one rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.attention.step import SourceRows, StepInputs
from octavo.runtime.scheduling.plan import StepPlan
from octavo.runtime.speech_messages import SourceShape


def with_sources(inputs: StepInputs, plan: StepPlan, shape: SourceShape) -> StepInputs:
    """The same inputs with the sources of the plan's sequences."""
    slots = tuple(it.slot for it in plan.scheduled)
    new = tuple((it.slot, _features(it.sequence.features, shape)) for it in plan.scheduled if it.is_new)
    return replace(inputs, sources=SourceRows(slots, new))


def _features(data: bytes, shape: SourceShape) -> Tensor:
    """[rows, length] float32."""
    return torch.from_numpy(np.frombuffer(data, "<f4").reshape(shape.rows, shape.length).copy())
