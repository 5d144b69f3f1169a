"""A rank that is not the driver: `python -m octavo.runtime.parallel.follower`, started by followers.py.

It loads its share of the model, as the driver does, and then does what orders say: build the step's inputs and compute,
meeting the other ranks in each sum. It knows no request and samples nothing. Its stdin is its lifeline: it ends with
the driver, and is killed with it where it is stopped. What it can't do it says in one line on its stdout.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Protocol

import msgspec

from octavo.freed_memory import keep_freed_memory
from octavo.runtime.launch import progress_path
from octavo.runtime.parallel.adapter_orders import MOST_NUMBERS, FollowerAdapters, is_step
from octavo.runtime.parallel.address import key_for
from octavo.runtime.parallel.channel import FollowerChannel
from octavo.runtime.parallel.follower_process import GONE, FollowerStart
from octavo.runtime.parallel.lifeline import (
    EndedError,
    be_killed_with_parent,
    end_with_parent,
    ignore_signals,
    one_line,
    read_line,
    says_it_all,
    start_heartbeat,
)
from octavo.runtime.parallel.meeting import Bye
from octavo.runtime.parallel.order import Int32s, StepOrder, largest_order
from octavo.runtime.parallel.remote_ranks import RemoteRank, join_group
from octavo.runtime.progress import Progress

if TYPE_CHECKING:
    from octavo.runtime.parallel.group import Gloo, Shared
    from octavo.runtime.worker.worker import Worker


def main() -> int:
    """Follow the driver until it ends; returns the exit code of what failed."""
    ignore_signals()
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
        run(start)
        return 0
    except EndedError as error:
        print(one_line(error), flush=True)
        return GONE
    except Exception as error:
        print(one_line(error), flush=True)
        if not says_it_all(error):
            traceback.print_exc()
    return 1


class Orders(Protocol):
    """A follower's end of a channel."""

    def receive(self) -> Int32s | None:
        """The next order; None when the driver is gone."""


def run(start: FollowerStart) -> None:
    """Join the other ranks, load, and follow until the driver is gone; on another machine see `end_process`.

    Raises JoinError, EndedError, and what loading raises.
    """
    remote = RemoteRank(start, end_process) if start.guest else None
    worker, order_numbers = load(start)
    watch(worker, start.heartbeat)
    orders: Orders
    if remote is not None:
        orders = remote.open()
    else:
        assert start.ends is not None
        orders = FollowerChannel(start.ends, order_numbers)
    keep_freed_memory()
    follow(worker, orders)


def end_process(bye: Bye) -> None:
    """The engine of this rank is gone: what another thread knows first, while this one may wait in a collective."""
    print(bye.why, flush=True)
    os._exit(0 if bye.is_final else GONE)


def load(start: FollowerStart) -> tuple[Worker, int]:
    """This rank's share of the model with an empty cache of as many blocks as the other ranks'; numbers of an order."""
    from octavo.runtime.parallel.group import Shared
    from octavo.runtime.startup import Phases, at_once, load_rank, prepare_device
    from octavo.runtime.worker.worker import Worker

    clock = Phases(time.time())
    device, _ = prepare_device(start.config, None, clock)
    group = group_of(start)
    rank = load_rank(start.config, device, group, clock)
    if not isinstance(group, Shared):
        group.limit = start.config.parallel.distributed_timeout_seconds
    worker = Worker(rank.model, rank.caches, rank.limits, *at_once(start.config, rank, clock))
    return worker, max(largest_order(rank.limits), MOST_NUMBERS)


def group_of(start: FollowerStart) -> Shared | Gloo:
    """This rank's end of the group."""
    from octavo.runtime.parallel.group import Shared

    if start.meeting is None:
        assert start.sums is not None
        return Shared(start.sums, start.rank, start.size)
    pair = key_for(start.meeting, os.environ)
    return join_group(start.meeting, pair, start.rank, start.size, lambda: None)


def watch(worker: Worker, heartbeat: str) -> None:
    """Tell the server that this rank gets on: the driver may wait for all of another stage's share of a step."""
    if heartbeat:
        worker.watch(Progress(progress_path(heartbeat)).mark)


def follow(worker: Worker, orders: Orders) -> None:
    """Compute step after step, until the driver is gone."""
    import torch

    from octavo.runtime.vision.steps import with_images

    adapters = None if worker.model.adapters is None else FollowerAdapters(worker.model.adapters)
    with torch.inference_mode():
        while (order := orders.receive()) is not None:
            if not is_step(order):
                assert adapters is not None
                adapters.take(order)
                continue
            step = StepOrder(order)
            inputs = worker.prepare(step)
            if step.images is not None:
                inputs = with_images(inputs, step.images, worker.model.of_driver)
            if adapters is not None:
                adapters.place(step)
            worker.compute(inputs, step.wants)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
