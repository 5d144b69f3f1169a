"""A machine that is not node 0 of an engine: starts its ranks, and again when node 0 starts the engine again.

Its ranks join the driver by themselves (remote_ranks.py). Here is known how each of them ended, which the driver is
told. All of them end with the first; and with this process.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.address import Address, key_for, master_address
from octavo.runtime.parallel.follower_process import GONE, FollowerProcess, FollowerStart, share_of_cores
from octavo.runtime.parallel.guest import leave
from octavo.runtime.parallel.placement import cores_to_share, num_cores

log = logging.getLogger(__name__)

GRACE_SECONDS = 1.0  # in which the driver learns of the rank that ended first, where others have only lost it


class HeadlessError(ValueError):
    """The ranks of this machine can't go on; the message says why."""


def run_ranks(config: EngineConfig) -> None:
    """Until the server has ended. Raises HeadlessError; ValueError for an address or a key; what a signal raises."""
    address = master_address(config.parallel)
    pair = key_for(address, os.environ)
    ranks = config.parallel.local_ranks
    log.info("ranks %d to %d of %d, for the server at %s", ranks[0], ranks[-1], config.parallel.num_ranks, address)
    while True:
        with _started(config, address) as followers:
            ends: queue.SimpleQueue[tuple[FollowerProcess, int, str]] = queue.SimpleQueue()
            for follower in followers:
                threading.Thread(target=_watch, args=(follower, ends), daemon=True).start()
            try:
                follower, code, why = ends.get()
            except (SystemExit, KeyboardInterrupt):
                first = followers[0]
                leave(address, pair, first.guest, f"{first.name}: node {config.parallel.node_rank} was told to end")
                raise
            if code == 0:
                log.info("%s", why)
                return
            if code == GONE:
                time.sleep(GRACE_SECONDS)
            leave(address, pair, follower.guest, f"{why} (node {config.parallel.node_rank})")
        if code > 0 and code != GONE:
            raise HeadlessError(why)
        log.error("%s; its ranks are started again, and wait for the engine", why)


@contextmanager
def _started(config: EngineConfig, address: Address) -> Iterator[list[FollowerProcess]]:
    """All ranks of this machine, which are ended in the end."""
    ranks = config.parallel.local_ranks
    cores = cores_to_share(config.parallel)
    threads = config.num_threads or max(1, num_cores() // len(ranks))
    config = msgspec.structs.replace(config, num_threads=threads)
    followers: list[FollowerProcess] = []
    try:
        for place, rank in enumerate(ranks):
            own = share_of_cores(cores, place, len(ranks))
            size = config.parallel.num_ranks
            start = FollowerStart(config, rank, size, own, meeting=address, guest=secrets.token_hex(8))
            followers.append(FollowerProcess(start, threads))
        yield followers
    finally:
        for follower in followers:
            follower.end()
        for follower in followers:
            follower.wait_for_end()


def _watch(follower: FollowerProcess, ends: queue.SimpleQueue[tuple[FollowerProcess, int, str]]) -> None:
    code, why = follower.wait()
    ends.put((follower, code, why))
