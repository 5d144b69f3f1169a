"""The device that a model is built for, as one value that is resolved once and passed in.

Whatever loading asks of the machine is in it, so a test that wants another machine passes another value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from octavo.runtime.model.operators import Ops
from octavo.runtime.model.select_operators import select_ops
from octavo.runtime.worker.device import capability, choose_device, table_notes

DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Device:
    """Where a model's tensors are, and what may compute with them.

    torch_device  the device of its tensors
    capability    a GPU's compute capability, 90 for an H100, which says what its kernels can multiply; 0 for a CPU
    ops           the bodies of the decoder's operators, for the type that the model computes in
    notes         lines that a person who starts a server must see
    """

    torch_device: torch.device
    capability: int
    ops: Callable[[torch.dtype], Ops]
    notes: tuple[str, ...] = ()

    @classmethod
    def choose(cls, name: DeviceName) -> Device:
        """The device of this machine that a name means; kernels take its tuning tables from now on.

        Raises ValueError for a GPU that is missing, or that no kernel is made for.
        """
        device = choose_device(name)
        return cls(device, capability(device), partial(select_ops, device), tuple(table_notes(device)))
