"""Images in a step: embeddings in place of placeholders, and positions where those of images are no line.

Only the driver knows a step's sequences and has a tower. Its order says which tokens are an image's, and where; of
several ranks the others add zeros to the embeddings that the driver has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.attention.step import Ahead, ImageRows, StepInputs
from octavo.runtime.parallel.order import Int32s, StepImages
from octavo.runtime.scheduling.plan import ScheduledSequence, StepPlan
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.vision.recipes import PromptImage
from octavo.runtime.vision.towers import VisionTower


class Axes(NamedTuple):
    """Positions [3, P] of a prompt's tokens in time, height and width, and what is added to those of later tokens."""

    of_prompt: NDArray[np.int64]
    shift: int


class _Shown(NamedTuple):
    """Embeddings first .. last of an image, and the rows of a step's tokens that have them."""

    image: PromptImage
    first: int
    last: int
    rows: NDArray[np.int64]


def images_of(plan: StepPlan, tower: VisionTower) -> StepImages | None:
    """What images are to a step; None: no sequence has any."""
    if not any(it.sequence.images for it in plan.scheduled):
        return None
    rows = [shown.rows for shown in _shown(plan, tower)]
    sight = tower.facts.sight
    ahead = []
    begin = 0
    for number, it in enumerate(plan.scheduled):
        for image in it.sequence.images_among(it.start, it.end):
            if image.is_whole:
                end = image.start + image.length
                own = begin - it.start + max(it.start, image.start), begin - it.start + min(it.end, end)
                ahead.append((number, *own, end, sight == "image_in_windows", sight == "prompt"))
        begin += it.end - it.start
    return StepImages(
        np.concatenate(rows).astype(np.int32) if rows else np.empty(0, np.int32),
        tower.width if rows else 0,
        _positions(plan, tower),
        np.array(ahead, np.int32).reshape(len(ahead), len(Ahead._fields)),
    )


def embeddings(plan: StepPlan, tower: VisionTower) -> Tensor:
    """[N, width] of the rows that a step's order names, which are some."""
    return torch.cat([tower.embed(shown.image)[shown.first : shown.last] for shown in _shown(plan, tower)])


def with_images(
    inputs: StepInputs, images: StepImages, of_driver: Callable[[Tensor], Tensor], values: Tensor | None = None
) -> StepInputs:
    """The inputs of a step with what its images are to it.

    of_driver: the model's, in which its ranks meet. values: as of `embeddings`; None: another rank has them.
    """
    rows = None
    if len(images.rows):
        own = torch.zeros(len(images.rows), images.width) if values is None else values
        rows = ImageRows(torch.from_numpy(images.rows.astype(np.int64)), of_driver(own))
    ahead = tuple(Ahead(*numbers[:4], *map(bool, numbers[4:])) for numbers in images.ahead.tolist())
    inputs = replace(inputs, images=rows, ahead=ahead)
    positions = torch.from_numpy(images.axes.astype(np.int64))
    if len(positions) == 1:
        return replace(inputs, positions=positions[0])
    return replace(inputs, axes=positions) if len(positions) else inputs


def _shown(plan: StepPlan, tower: VisionTower) -> Iterator[_Shown]:
    """What of images the tokens of a step are."""
    begin = 0
    for it in plan.scheduled:
        for image in it.sequence.images_among(it.start, it.end):
            places = tower.places(it.sequence.token_ids, image)
            first, last = map(int, np.searchsorted(places, (it.start, it.end)))
            if first < last:
                yield _Shown(image, first, last, places[first:last] - it.start + begin)
        begin += it.end - it.start


def _positions(plan: StepPlan, tower: VisionTower) -> Int32s:
    """As StepImages.axes: with M-RoPE three of each token where some differ, else the one by which it is rotated."""
    axes = [_axes_of(it, tower) for it in plan.scheduled]
    if all(one is None for one in axes):
        return np.empty((0, plan.num_tokens), np.int32)
    wanted = []
    for it, one in zip(plan.scheduled, axes, strict=True):
        line = np.arange(it.start, it.end, dtype=np.int32)
        positions = np.broadcast_to(line + (0 if one is None else one.shift), (3, len(line))).copy()
        if one is not None and it.start < one.of_prompt.shape[1]:
            prompt = one.of_prompt[:, it.start : it.end]
            positions[:, : prompt.shape[1]] = prompt
        wanted.append(positions)
    found = np.concatenate(wanted, axis=1).astype(np.int32)
    return found[:1] if (found == found[0]).all() else found


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
