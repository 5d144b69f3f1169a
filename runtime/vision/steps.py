"""Images in a step: embeddings in place of placeholders, and positions where those of images are no line.

Only the driver knows a step's sequences, and so what their images are; it adds this to the inputs that orders make.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.kernels.attention.step import Ahead, ImageRows, StepInputs
from octavo.runtime.scheduling.plan import ScheduledSequence, StepPlan
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.vision.towers import VisionTower


class Axes(NamedTuple):
    """Positions [3, P] of a prompt's tokens in time, height and width, and what is added to those of later tokens."""

    of_prompt: NDArray[np.int64]
    shift: int


def with_images(inputs: StepInputs, plan: StepPlan, tower: VisionTower) -> StepInputs:
    """The inputs of a step with what its images are to it; the same where there are none."""
    if not any(it.sequence.images for it in plan.scheduled):
        return inputs
    inputs = _with_positions(inputs, plan, tower)
    sight = tower.facts.sight
    rows = []
    values = []
    ahead = []
    begin = 0
    for number, it in enumerate(plan.scheduled):
        for image in it.sequence.images_among(it.start, it.end):
            places = tower.places(it.sequence.token_ids, image)
            first, last = np.searchsorted(places, (it.start, it.end))
            if first < last:
                rows.append(places[first:last] - it.start + begin)
                values.append(tower.embed(image)[first:last])
            if image.is_whole:
                end = image.start + image.length
                own = begin - it.start + max(it.start, image.start), begin - it.start + min(it.end, end)
                ahead.append(Ahead(number, *own, end, sight == "image_in_windows", sight == "prompt"))
        begin += it.end - it.start
    images = ImageRows(torch.from_numpy(np.concatenate(rows)), torch.cat(values)) if rows else None
    return replace(inputs, images=images, ahead=tuple(ahead))


def _with_positions(inputs: StepInputs, plan: StepPlan, tower: VisionTower) -> StepInputs:
    """With M-RoPE: three positions of each token where some differ, else the one by which tokens are rotated."""
    axes = [_axes_of(it, tower) for it in plan.scheduled]
    if all(one is None for one in axes):
        return inputs
    wanted = []
    for it, one in zip(plan.scheduled, axes, strict=True):
        line = np.arange(it.start, it.end, dtype=np.int64)
        positions = np.broadcast_to(line + (0 if one is None else one.shift), (3, len(line))).copy()
        if one is not None and it.start < one.of_prompt.shape[1]:
            prompt = one.of_prompt[:, it.start : it.end]
            positions[:, : prompt.shape[1]] = prompt
        wanted.append(positions)
    positions = np.concatenate(wanted, axis=1)
    if (positions == positions[0]).all():
        return replace(inputs, positions=torch.from_numpy(positions[0].copy()))
    return replace(inputs, axes=torch.from_numpy(positions))


def _axes_of(it: ScheduledSequence, tower: VisionTower) -> Axes | None:
    sequence = it.sequence
    if not sequence.images or tower.grid(sequence.images[0]) is None:
        return None
    if not isinstance(sequence.axes, Axes):
        sequence.axes = _axes(sequence, tower)
    return sequence.axes


def _axes(sequence: Sequence, tower: VisionTower) -> Axes:
    """As Qwen2-VL counts: text by one; an image's rows and columns from where it begins, and what follows it from
    behind the longer of its sides.
    """
    pieces = []
    position = 0
    done = 0
    for image in sequence.images:
        places = tower.places(sequence.token_ids, image)
        first = int(places[0])
        grid = tower.grid(image)
        assert grid is not None
        columns, rows = grid
        text = np.arange(position, position + first - done)
        pieces.append(np.stack((text, text, text)))
        position += first - done
        row, column = np.divmod(np.arange(rows * columns), columns)
        pieces.append(np.stack((np.zeros_like(row), row, column)) + position)
        position += max(rows, columns)
        done = first + rows * columns
    rest = np.arange(position, position + sequence.num_prompt - done)
    pieces.append(np.stack((rest, rest, rest)))
    return Axes(np.concatenate(pieces, axis=1), position - done)
