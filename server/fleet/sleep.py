"""A fleet's engines asleep: their memory given back, and taken again when they wake up.

At level 1 the engine processes stay, with their weights, and give the KV cache's memory back. At level 2 they end, and
are started again, which reads the weights from the disk. What requests can ask for comes back with an engine, by the
way that it does behind a crash: the vocabulary, adapters, and what was kept of open requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.fleet import POLL_SECONDS, Engine, Fleet
from octavo.server.fleet.member import Member

Level = Literal[1, 2]
Memory = Literal["weights", "kv_cache"]
OpenRequests = Literal["abort", "wait", "keep"]
ALL_MEMORY: frozenset[Memory] = frozenset(get_args(Memory))


class SleepError(RuntimeError):
    """What can't be put to sleep, or doesn't wake up; the message is one line."""


class Sleep:
    """How deep the engines of one fleet sleep. Use from its event loop only.

    waking: what wakes them, for those who are refused. level: 0 while they are awake. given_back: what the sleep has
    given back and no wake-up has taken again.
    """

    def __init__(self, fleet: Fleet, waking: str = "POST /wake_up") -> None:
        self._fleet = fleet
        self._refusal = f"the engines sleep; {waking} wakes them"
        self._changing = asyncio.Lock()
        self._before: tuple[Callable[[int], Engine], Callable[[], None]] | None = None  # of what it will load
        self.level: Literal[0] | Level = 0
        self.given_back: frozenset[Memory] = frozenset()

    async def sleep(self, level: Level, open_requests: OpenRequests = "abort", *, refuses: bool = True) -> int:
        """Put all engines to sleep; returns the bytes of memory that are free for it. Raises SleepError.

        Open requests end now (abort), are waited for (wait), or go on where they were after the wake-up (keep), as do
        those of a wait that stand still; new ones are refused, or wait too. Engines that sleep already fall deeper.
        """
        async with self._changing:
            if level < self.level or (level == self.level and self.given_back == ALL_MEMORY):
                return 0
            self._check(level)
            fleet = self._fleet
            before = self.level
            fleet.asleep = self._refusal if refuses else None
            try:
                await self._end_open(open_requests)
                self._check(level)  # one may have died meanwhile
                freed = await self._rest(level)
            except SleepError:
                fleet.asleep = self._refusal if before else None
                raise
            self.level = level
            self.given_back = ALL_MEMORY
            return freed

    async def wake(self, memory: Iterable[Memory] = ALL_MEMORY, *, keeps_open: bool = False) -> float:
        """Take memory again; the engines are awake when nothing is left to take. Returns the seconds that this took.

        Requests that come meanwhile wait for it. Raises SleepError where an engine doesn't come up: all of them sleep
        on then, at level 2, and those requests end with the same error, or wait on (keeps_open).
        """
        begin = time.monotonic()
        async with self._changing:
            if not self.level:
                return 0.0
            left = self.given_back.difference(memory)
            fleet = self._fleet
            fleet.asleep = self._refusal if left else None
            try:
                if "weights" not in left:
                    await self._start_engines()
            except SleepError as error:
                self.level = 2
                self.given_back = ALL_MEMORY
                if self._before is not None:
                    fleet.start, undone = self._before
                    self._before = None
                    undone()
                    error = SleepError(f"{error}; the next wake-up loads the weights that were served before")
                if not keeps_open:
                    fleet.asleep = self._refusal
                    fleet.fail_all(str(error))
                raise error from None
            self.given_back = left
            if "weights" not in left:
                self._before = None
            if not left:
                self.level = 0
                self._open_all()
        return time.monotonic() - begin

    async def load_instead(self, start: Callable[[int], Engine], undone: Callable[[], None]) -> bool:
        """Let the wake-up start engines this way; if they can't be started, the one behind it does as before.

        undone: is called then. False where no weights are asleep, and nothing is changed.
        """
        async with self._changing:  # a wake-up that is under way loads those of before
            if self.level != 2 or "weights" not in self.given_back:
                return False
            if self._before is None:
                self._before = self._fleet.start, undone
            self._fleet.start = start
            return True

    def _check(self, level: Level) -> None:
        """Raise SleepError for what these engines can't do."""
        for member in self._fleet.members:
            if not self.level and not member.is_up:
                raise SleepError(f"not now: {member.trouble}")
            if level == 2:
                continue
            device = member.ready.report.device
            if member.ready.report.ranks:
                count = len(member.ready.report.ranks)
                raise SleepError(f"level 1 with {count} ranks in an engine is not supported; level 2 works")
            if not device.startswith("cpu"):
                raise SleepError(f"level 1 on {device} is not supported: weights can't be moved; level 2 works")

    async def _end_open(self, open_requests: OpenRequests) -> None:
        fleet = self._fleet
        if open_requests == "abort":
            fleet.abort()
        while open_requests == "wait" and fleet.num_open and not fleet.stands_still:
            await asyncio.sleep(POLL_SECONDS)

    async def _rest(self, level: Level) -> int:
        """Have the engines give their memory back: how much."""
        members = self._fleet.members
        for member in members:
            member.is_resting = True
            if member.is_up:
                self._fleet.put_aside(member)
                member.go_down(f"engine {member.index} sleeps")
        if level == 2:
            return await self._end_engines(members)
        try:
            told = await asyncio.gather(*(member.client.sleep() for member in members))
        except EngineDeadError as error:
            raise self._stay_awake(str(error)) from None
        if problem := next((one.error for one in told if one.error), None):
            raise self._stay_awake(problem)
        return sum(one.num_bytes for one in told)

    def _stay_awake(self, problem: str) -> SleepError:
        """An engine could not give its memory back: those that live go on, and others are started again."""
        self._open_all()
        return SleepError(problem)

    async def _end_engines(self, members: Sequence[Member]) -> int:
        """End their processes. Returns the bytes that these held."""
        held = sum(member.client.resident_bytes for member in members)
        await asyncio.gather(*(member.client.close() for member in members))
        return held

    async def _start_engines(self) -> None:
        """Start those whose processes are gone. Raises SleepError when one doesn't come up; then none of them is."""
        fleet = self._fleet
        gone = [member for member in fleet.members if member.client.death is not None]
        try:
            for member in gone:
                await member.client.close()
                fleet.connect(member, fleet.start(member.index))
            await asyncio.gather(*(fleet.meet(member) for member in gone))
            for member in gone:
                fleet.on_up(member.index)
        except (EngineDeadError, OSError) as error:
            await self._end_engines(fleet.members)
            raise SleepError(f"the engines sleep on, since they can't be woken: {error}") from None

    def _open_all(self) -> None:
        """Let the engines have requests again; those that have died meanwhile are started again."""
        for member in self._fleet.members:
            member.is_resting = False
            if member.client.death is None:
                self._fleet.chooser.open(member, member.ready)
            else:
                self._fleet.lose(member, member.client.death)
        self._fleet.place()
