"""Ranks on other machines: the driver's side, where they meet and get their orders, and their own.

A headless node (headless.py) starts them, and gives each a FollowerStart with the address of the meeting and a name.
They come, are told where orders are, load, and follow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.address import Address, KeyPair, key_for, master_address, own_host_towards
from octavo.runtime.parallel.agreement import agreement_of
from octavo.runtime.parallel.follower_process import FollowerStart
from octavo.runtime.parallel.guest import Guest, Values
from octavo.runtime.parallel.meeting import Bye, Hello, Meeting, Owner
from octavo.runtime.parallel.order import Int32s
from octavo.runtime.parallel.tcp_channel import TcpDriverChannel, TcpFollowerChannel

if TYPE_CHECKING:
    from octavo.runtime.parallel.group import Gloo

FLAGS = "--master-addr, --master-port"


class RemoteRanks:
    """Those of one engine, as the driver has them. meeting: the address that they are told.

    address: of this machine; port 0 takes a free one. pair: see address.key_for. Raises ValueError where it can't be
    had.
    """

    def __init__(self, config: EngineConfig, ranks: range, address: Address, pair: KeyPair | None) -> None:
        self.ranks = ranks
        self._size = config.parallel.num_ranks
        self._pair = pair
        self._patience = config.parallel.distributed_timeout_seconds
        self._failure: str | None = None
        self._fail: Callable[[str], None] = lambda _: None
        self._group: Gloo | None = None
        self._orders = TcpDriverChannel(address.host, pair, ranks, lambda: self._failure)
        details = msgspec.msgpack.encode(self._orders.address)
        owner = Owner(
            lambda *_: details if self._failure is None else None,  # another engine is about to come
            lambda _, why: self._lose(why),
            lambda _, why: self._lose(why),
        )
        names = {rank: f"rank {rank} of {self._size}" for rank in ranks}
        self._meeting = Meeting(address, pair, names, agreement_of(config), self._patience, owner, FLAGS)
        self.meeting = self._meeting.address

    def watch_ranks(self, fail: Callable[[str], None]) -> None:
        """fail is called with the reason, in another thread, when one of them is lost."""
        self._fail = fail
        if self._failure is not None:
            fail(self._failure)

    def stop(self, why: str) -> None:
        """A rank has ended: end all waiting."""
        self._failure = self._failure or why

    def _lose(self, why: str) -> None:
        self.stop(why)
        self._fail(why)

    def join(self, rank: int) -> Gloo:
        """The group of all ranks; waits until they are there. Raises EndedError."""
        self._group = join_group(self.meeting, self._pair, rank, self._size, lambda: self._failure)
        return self._group

    def watch_waits(self, mark: Callable[[], None]) -> None:
        """mark is called now and then while this rank waits in a collective."""
        assert self._group is not None
        self._group.on_wait = mark

    def open(self) -> None:
        """Wait until all of them can take orders. Raises EndedError."""
        self._orders.open()
        if self._group is not None:
            self._group.limit = self._patience

    def send(self, order: Int32s) -> None:
        """Tell all of them a step. Raises EndedError where one is gone."""
        self._orders.send(order)

    def close(self, error: str = "") -> None:
        """Tell all of them that this engine has ended. error: why, where another one may follow."""
        self._meeting.close(error or "the server has ended", is_final=not error)
        self._orders.close()


def ranks_of_other_nodes(config: EngineConfig) -> RemoteRanks | None:
    """Those for which headless nodes come; None where the engine is on one machine. Raises ValueError."""
    parallel = config.parallel
    if parallel.nnodes == 1:
        return None
    address = master_address(parallel)
    ranks = range(parallel.ranks_of(1).start, parallel.num_ranks)
    return RemoteRanks(config, ranks, address, key_for(address, os.environ))


def join_group(meeting: Address, pair: KeyPair | None, rank: int, size: int, why: Callable[[], str | None]) -> Gloo:
    """A rank's end of a group over machines. why: of the end of all waiting; None before. Raises EndedError."""
    from octavo.runtime.parallel.group import Gloo

    values = Values(meeting, pair, why)
    try:
        return Gloo(values, own_host_towards(meeting), rank, size, why)
    finally:
        values.close()


class RemoteRank:
    """A rank on another machine than the driver's, as its own process has it: joined, and beating.

    on_over is called in another thread when the engine is gone. Raises JoinError, and ValueError.
    """

    def __init__(self, start: FollowerStart, on_over: Callable[[Bye], None]) -> None:
        assert start.meeting is not None
        self._pair = key_for(start.meeting, os.environ)
        host = own_host_towards(start.meeting)
        node = f"node {start.config.parallel.node_rank}" + (f" ({host})" if host else "")
        hello = Hello(start.rank, start.guest, node, agreement_of(start.config))
        guest = Guest(start.meeting, self._pair, hello, start.config.parallel.distributed_timeout_seconds)
        self._orders = msgspec.msgpack.decode(guest.join(), type=Address)
        self._rank = start.rank
        guest.watch(on_over)

    def open(self) -> TcpFollowerChannel:
        """The channel of orders, once everything is loaded."""
        return TcpFollowerChannel(self._orders, self._pair, self._rank)
