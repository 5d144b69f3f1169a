"""New weights for a fleet: engines that have them take the place of those that serve, with all open requests.

Where there is room, new engines load beside the old ones, which serve until all of the new ones can, and end between
two of their steps; whatever keeps a new one from it, the old ones never hear of it. Where there is none (a GPU), the
old ones end first, requests wait, and if the new ones don't come up, the old ones are started again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from octavo.server.engine_client import EngineClient, EngineDeadError
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.sleep import Sleep, SleepError

if TYPE_CHECKING:
    from octavo.runtime.launch import EngineProcess
    from octavo.runtime.messages import Ready

logger = logging.getLogger(__name__)

Start = Callable[[int], "EngineProcess"]


class UpdateError(RuntimeError):
    """Weights that can't be served; the old ones are. The message is one line."""


class Renewal:
    """Replaces the weights of one fleet. Use from its event loop only.

    beside: whether new engines find room while the old ones serve.
    """

    def __init__(self, fleet: Fleet, sleep: Sleep, *, beside: bool) -> None:
        self._fleet = fleet
        self._sleep = sleep
        self._beside = beside
        self._changing = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    async def renew(self, start: Start, *, aborts: bool = False, undone: Callable[[], None] = lambda: None) -> int:
        """Serve the weights with which `start` starts an engine; returns how many open requests go on with them.

        aborts: open requests end instead. Of engines that sleep without weights the wake-up loads these; undone
        is called if it can't. Raises UpdateError.
        """
        begin = time.monotonic()
        async with self._changing:
            if await self._sleep.load_instead(start, undone):
                return 0
            self._check_up()
            count = await (self._renew_beside if self._beside else self._renew_in_turn)(start, aborts=aborts)
        logger.info("new weights are served after %.2f s; %d requests go on", time.monotonic() - begin, count)
        return count

    def _check_up(self) -> None:
        """Raise UpdateError for an engine that doesn't serve, unless all of them sleep in part."""
        for member in self._fleet.members:
            if not member.is_up and (not self._sleep.level or member.client.death is not None):
                raise UpdateError(f"not now: {member.trouble}")
        if self._sleep.level and not self._beside:
            raise UpdateError("not while the engines sleep in part: wake them first, or put them to sleep at level 2")

    async def _renew_beside(self, start: Start, *, aborts: bool) -> int:
        fleet = self._fleet
        clients: list[EngineClient] = []
        try:
            clients.extend(fleet.client_of(member, start(member.index)) for member in fleet.members)
            readies = await asyncio.gather(*(client.ready() for client in clients))
            self._check(readies)
            self._check_up()
            if dead := next((client.death for client in clients if client.death is not None), None):
                raise EngineDeadError(dead)
        except (EngineDeadError, OSError, UpdateError) as error:
            await asyncio.gather(*(client.close() for client in clients))
            raise UpdateError(str(error)) from None
        except BaseException:  # whoever asked has gone
            for client in clients:
                self._end_soon(client)
            raise
        if aborts:
            fleet.abort()
        count = fleet.num_open
        for member, client, ready in zip(fleet.members, clients, readies, strict=True):
            self._end_soon(member.client)
            fleet.hand_over(member, client, ready)
            if not self._sleep.level:
                fleet.chooser.open(member, ready)
        fleet.start = start
        fleet.place()
        return count

    def _check(self, readies: Sequence[Ready]) -> None:
        """Raise UpdateError where what the server knows of the model is not so of these engines."""
        for member, new in zip(self._fleet.members, readies, strict=True):
            for name in ("max_model_len", "vocab_size"):
                if getattr(new, name) != getattr(member.ready, name):
                    raise UpdateError(f"{name} would be {getattr(new, name)}, and is {getattr(member.ready, name)}")
            if (new.vision, new.source) != (member.ready.vision, member.ready.source):
                raise UpdateError(
                    "images or recordings would be read in another way than now, or not at all: are config.json and "
                    "preprocessor_config.json the model's?"
                )

    async def _renew_in_turn(self, start: Start, *, aborts: bool) -> int:
        fleet = self._fleet
        before = fleet.start
        count = 0 if aborts else fleet.num_open
        try:
            await self._sleep.sleep(2, "abort" if aborts else "keep", refuses=False)
        except SleepError as error:
            raise UpdateError(str(error)) from None
        fleet.start = start
        try:
            await self._sleep.wake(keeps_open=True)
        except SleepError as error:
            fleet.start = before
            try:
                await self._sleep.wake()
            except SleepError as other:
                raise UpdateError(f"{error}; the old weights can't be loaded either: {other}") from None
            raise UpdateError(str(error)) from None
        return count

    def _end_soon(self, client: EngineClient) -> None:
        task = asyncio.get_running_loop().create_task(client.close())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
