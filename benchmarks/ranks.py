"""What the ranks of an engine wait for in each step on this machine: its order, and the sums over ranks.

    PYTHONPATH=src nice -n -19 python -m benchmarks.ranks --ranks 2

One process a rank, each on a core of its own. A sum is `Group.all_reduce` of so many float32, called again and again by
all ranks. An order of 5 KB is timed from the driver's `send` until the follower's part of a sum of one number has come
back, less such a sum: once while the follower is asleep, as it is while the driver samples and plans, and once while
it waits awake for the next one. Medians, and the fastest tenth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from octavo.kernels.collective import shm_cpu
from octavo.runtime.parallel.channel import DriverChannel, FollowerChannel
from octavo.runtime.parallel.follower_process import share_of_cores
from octavo.runtime.parallel.group import Shared

ORDER_NUMBERS = 1280  # int32: some 256 decodes
FLOATS = (1, 576, 4096, 16384, 262144)  # 576: a row of SmolLM2
PAUSE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    channel = DriverChannel(args.ranks - 1)
    channel.open(ORDER_NUMBERS)
    memory = os.memfd_create("octavo-benchmark")
    for kernel in shm_cpu.KERNELS:
        kernel.compile()  # before there are several processes
    children = []
    for rank in range(1, args.ranks):
        child = os.fork()
        if child == 0:
            os.sched_setaffinity(0, share_of_cores(cores, rank, args.ranks))
            follow(
                FollowerChannel(channel.ends[rank - 1], ORDER_NUMBERS), Shared(memory, rank, args.ranks), args.rounds
            )
            os._exit(0)
        children.append(child)
    os.sched_setaffinity(0, share_of_cores(cores, 0, args.ranks))
    drive(channel, Shared(memory, 0, args.ranks), args.rounds)
    for child in children:
        os.waitpid(child, 0)


def sums(group: Shared, count: int, rounds: int) -> list[float]:
    x = torch.zeros(count)
    return [timed(lambda: group.all_reduce(x)) for _ in range(rounds)]


def follow(channel: FollowerChannel, group: Shared, rounds: int) -> None:
    for count in FLOATS:
        sums(group, count, rounds)
    x = torch.zeros(1)
    for _ in range(2 * rounds):
        channel.receive()
        group.all_reduce(x)


def drive(channel: DriverChannel, group: Shared, rounds: int) -> None:
    medians = {}
    for count in FLOATS:
        seconds = sums(group, count, rounds)
        medians[count] = statistics.median(seconds)
        show(f"sum of {4 * count / 1000:,.1f} KB", seconds)
    order = np.zeros(ORDER_NUMBERS, np.int32)
    x = torch.zeros(1)

    def order_and_sum() -> None:
        channel.send(order)
        group.all_reduce(x)

    for name, pause in (("asleep", PAUSE), ("awake", 0.0)):
        seconds = []
        for _ in range(rounds):
            time.sleep(pause)
            seconds.append(timed(order_and_sum) - medians[1])
        show(f"order of {4 * ORDER_NUMBERS / 1000:,.1f} KB, followers {name}", seconds)


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def show(name: str, seconds: list[float]) -> None:
    tenth = statistics.quantiles(seconds, n=10)[0]
    print(f"{name}: {1e6 * statistics.median(seconds):.1f} us, p10 {1e6 * tenth:.1f} us", flush=True)


if __name__ == "__main__":
    main()
