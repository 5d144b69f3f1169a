"""A member of a calibration's team on this machine, other than the first: `python -m octavo.jobs.calibration_worker`.

calibration_team.py starts it. Its stdin is its lifeline: a line that says what to do, and its end is the parent's end.
What it can't do it says in one line on its stdout.
"""

from __future__ import annotations

import mmap
import os
import sys
import traceback

import msgspec

from octavo.jobs.calibration_member import MemberStart, take_part
from octavo.kernels.native.environment import ENVIRONMENT
from octavo.runtime.parallel.lifeline import (
    be_killed_with_parent,
    end_with_parent,
    ignore_signals,
    one_line,
    read_line,
    says_it_all,
)


class WorkerStart(msgspec.Struct, frozen=True):
    """The line. cores: the CPUs that it computes on; none: any. sums, tokens: files in memory that it inherits, through
    which members add up, and with the token ids, of this shape.
    """

    member: MemberStart
    cores: list[int]
    sums: int
    tokens: int
    shape: tuple[int, int]


def main() -> int:
    """Take part until the end; returns the exit code."""
    ignore_signals()
    be_killed_with_parent()
    line = read_line(0)
    if not line:
        return 0
    start = msgspec.json.decode(line, type=WorkerStart)
    end_with_parent()
    if start.cores:
        os.sched_setaffinity(0, start.cores)
    os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported
    try:
        run(start)
    except Exception as error:
        print(one_line(error), flush=True)
        if not says_it_all(error):
            traceback.print_exc()
        return 1
    return 0


def run(start: WorkerStart) -> None:
    import numpy as np
    import torch

    from octavo.runtime.parallel.group import Shared

    numbers = np.frombuffer(mmap.mmap(start.tokens, 0), np.int64).reshape(start.shape)
    group = Shared(start.sums, start.member.rank, start.member.size)
    take_part(start.member, torch.tensor(numbers), group)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
