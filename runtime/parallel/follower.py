"""A rank that is not the driver: `python -m octavo.runtime.parallel.follower`, started by followers.py.

It loads its share of the model (all of it, as long as weights aren't cut), and then does what orders say: build the
step's inputs, compute, and hand its logits over where they are asked for. It knows no request and samples nothing.
Its stdin is its lifeline: it ends with the driver.
"""

from __future__ import annotations

import os
import signal
import sys

import msgspec
import numpy as np
import torch

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.channel import ChannelEnds, FollowerChannel
from octavo.runtime.parallel.lifeline import end_with_parent, read_line
from octavo.runtime.parallel.order import StepOrder
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.worker.worker import Worker


class FollowerStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line on a follower's stdin. limits: the driver's, so that blocks and slots have the same numbers."""

    config: EngineConfig
    limits: SchedulerConfig
    ends: ChannelEnds
    num_followers: int


def main() -> int:
    """Follow the driver until it ends; returns the exit code of a start that failed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the driver ends us
        signal.signal(number, signal.SIG_IGN)
    line = read_line(0)
    if not line:
        return 0
    start = msgspec.json.decode(line, type=FollowerStart)
    end_with_parent()
    channel = FollowerChannel(start.ends, start.num_followers)
    worker = load_worker(start)
    channel.answer(np.empty((0, 0), np.float32))  # ready
    follow(worker, channel)
    return 0


@torch.inference_mode()
def load_worker(start: FollowerStart) -> Worker:
    """The model and an empty cache of as many blocks as the driver's."""
    from octavo.runtime.model import select_operators
    from octavo.runtime.model.weights import load_model
    from octavo.runtime.worker import kv_cache
    from octavo.runtime.worker.device import choose_device, set_threads

    device = choose_device(start.config.device)
    set_threads(start.config.num_threads)
    select_operators.warm_up(device)
    model = load_model(start.config)
    config = msgspec.structs.replace(start.config, num_blocks=start.limits.num_blocks)
    caches, _ = kv_cache.create(model, config, notes=[])
    return Worker(model, caches, start.limits)


@torch.inference_mode()
def follow(worker: Worker, channel: FollowerChannel) -> None:
    """Compute step after step, for as long as this process lives."""
    while True:
        order = StepOrder(channel.receive())
        logits = worker.forward(worker.prepare(order))
        if order.answers:
            channel.answer(logits.cpu().numpy())


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
