"""One of the processes that share a calibration's samples: its start, its end of the group, and its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.calibration.recipe import Recipe
from octavo.jobs.quantize_job import Device

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.calibration.block import Runner
    from octavo.quant.checkpoint import Checkpoint
    from octavo.runtime.parallel.group import Group


class MemberStart(msgspec.Struct, frozen=True):
    """What a member other than the first must know; the text's token ids come beside it.

    model       the source's directory, and directory: the one in which the copy is made; both as this member finds them
    recipe      its fields, whose choices are all made
    done        the units that an earlier run has finished
    max_length  tokens that the model is run on at the most
    """

    rank: int
    size: int
    model: str
    directory: str
    recipe: dict[str, Any]
    done: list[str]
    device: Device
    max_length: int
    offload_dir: str | None
    num_threads: int | None = None


class Member:
    """This process's end of the group, as calibration wants it (`calibration/team.py`)."""

    def __init__(self, group: Group) -> None:
        self.rank = group.rank
        self.size = group.size
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        with told_of_members():
            return self._group.all_reduce(x)

    def of_all(self, number: int) -> list[int]:
        with told_of_members():
            return self._group.of_all(number)


@contextmanager
def told_of_members() -> Iterator[None]:
    """Have the end of another member tell of calibration, and not of an engine."""
    from octavo.calibration.team import TeamError
    from octavo.runtime.parallel.lifeline import EndedError

    try:
        yield
    except EndedError as e:
        raise TeamError(str(e).replace("rank of this engine", "calibration worker")) from None


def take_part(start: MemberStart, token_ids: Tensor, group: Group) -> None:
    """Do this member's share, to the end. token_ids: int64 [num_samples, seq_len]. Raises what quantizing raises."""
    from octavo.calibration.prepare import Calibration, plan_model
    from octavo.calibration.quantize_model import follow_model
    from octavo.calibration.text.data import CalibrationData
    from octavo.jobs.rotated_source import rotated_source
    from octavo.quant.dequantized import open_dequantized
    from octavo.runtime.model.families.registry import LAYOUTS
    from octavo.runtime.worker.device import set_threads

    set_threads(start.num_threads)
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in start.recipe.items()}
    recipe = Recipe(**fields)
    checkpoint = rotated_source(open_dequantized(Path(start.model), LAYOUTS), recipe, [])
    how = {"overwrite": False, "resume": True}
    directory = Path(start.directory)
    planned = plan_model(checkpoint, directory, recipe, max_shard_bytes=1 << 62, **how)
    runner = make_runner(checkpoint, start.max_length, start.device)
    data = CalibrationData(list(token_ids), "what the first member has", 0)
    offload_dir = None if start.offload_dir is None else Path(start.offload_dir)
    calibration = Calibration(data, runner, offload_dir, start.size)
    prepared = replace(planned, calibration=calibration)
    follow_model(prepared, directory, start.done, Member(group))


def make_runner(checkpoint: Checkpoint, max_length: int, device: Device) -> Runner:
    """The model block by block. Raises QuantizeError for more positions than it has, or a device that isn't there."""
    from octavo.calibration.layers import QuantizeError
    from octavo.runtime.model import device as devices
    from octavo.runtime.model.blocks import BlockRunner
    from octavo.runtime.model.sources import CheckpointSource

    try:
        found = devices.Device.choose(device)
        prefix = CheckpointSource(checkpoint).prefix
        return BlockRunner(checkpoint.config, prefix, max_length, found, transforms=checkpoint.transforms)
    except ValueError as e:
        raise QuantizeError(str(e)) from e
