"""A rank that is not the driver: `python -m octavo.runtime.parallel.follower`, started by followers.py.

It loads its share of the model, as the driver does, and then does what orders say: build the step's inputs and compute,
meeting the other ranks in each sum. It knows no request and samples nothing. Its stdin is its lifeline: it ends with
the driver, and is killed with it where it is stopped. What it can't do it says in one line on its stdout.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING

import msgspec

from octavo.runtime.launch import progress_path
from octavo.runtime.parallel.channel import FollowerChannel
from octavo.runtime.parallel.followers import FollowerStart
from octavo.runtime.parallel.lifeline import (
    be_killed_with_parent,
    end_with_parent,
    one_line,
    read_line,
    says_it_all,
    start_heartbeat,
)
from octavo.runtime.parallel.order import StepOrder, largest_order
from octavo.runtime.progress import Progress

if TYPE_CHECKING:
    from octavo.runtime.worker.worker import Worker


def main() -> int:
    """Follow the driver until it ends; returns the exit code of what failed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the driver ends us
        signal.signal(number, signal.SIG_IGN)
    be_killed_with_parent()
    line = read_line(0)  # nothing, where the parent has ended before that
    if not line:
        return 0
    start = msgspec.json.decode(line, type=FollowerStart)
    end_with_parent()
    if start.heartbeat:
        start_heartbeat(start.heartbeat, start.rank)
    if start.cores:
        os.sched_setaffinity(0, start.cores)
    try:
        worker, channel = load(start)
        watch(worker, start.heartbeat)
        follow(worker, channel)
        return 0
    except Exception as error:
        print(one_line(error), flush=True)
        if not says_it_all(error):
            traceback.print_exc()
    return 1


def load(start: FollowerStart) -> tuple[Worker, FollowerChannel]:
    """This rank's share of the model, an empty cache of as many blocks as the other ranks', and the ring of orders."""
    from octavo.runtime.parallel.group import Shared
    from octavo.runtime.startup import Phases, load_rank, prepare_device
    from octavo.runtime.worker.worker import Worker

    clock = Phases(time.time())
    device, _ = prepare_device(start.config, None, clock)
    rank = load_rank(start.config, device, Shared(start.sums, start.rank, start.size), clock)
    worker = Worker(rank.model, rank.caches, rank.limits)
    return worker, FollowerChannel(start.ends, largest_order(rank.limits))


def watch(worker: Worker, heartbeat: str) -> None:
    """Tell the server that this rank gets on: the driver may wait for all of another stage's share of a step."""
    if heartbeat:
        worker.watch(Progress(progress_path(heartbeat)).mark)


def follow(worker: Worker, channel: FollowerChannel) -> None:
    """Compute step after step, until the driver is gone."""
    import torch

    with torch.inference_mode():
        while (order := channel.receive()) is not None:
            step = StepOrder(order)
            worker.compute(worker.prepare(step), step.wants)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
