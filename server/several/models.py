"""Several models of one server: which of them are loaded, and which make room for others.

A model is loaded when a request first asks for it. Where as many are loaded as may be, the one that was used least
recently leaves: whoever asks for it from then on waits, so that it gets idle however much it is asked for.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.types import ASGIApp

from octavo.server.errors import ApiError
from octavo.server.several.slot import LoadError, Slot

POLL_SECONDS = 0.02
LOOK_SECONDS = 1.0  # at the most between two looks for models that are idle


class Models:
    """All of them, by name. Use from one event loop only.

    most_loaded: as many may be loaded at a time; None: all. idle_seconds: after which one is unloaded; None: never.
    death: None: it ends by a signal alone.
    """

    death: str | None = None

    def __init__(self, slots: Mapping[str, Slot], most_loaded: int | None, idle_seconds: float | None) -> None:
        self.slots = slots
        self.refusal: str | None = None
        self._most_loaded = most_loaded or len(slots)
        self._idle_seconds = idle_seconds
        self._changing = asyncio.Lock()  # one model comes or goes at a time
        self._loads: dict[str, asyncio.Task[None]] = {}

    @property
    def num_open(self) -> int:
        """Requests that are under way in any model, or wait for one."""
        return sum(slot.num_users + slot.num_waiting for slot in self.slots.values())

    @asynccontextmanager
    async def used(self, name: str) -> AsyncIterator[ASGIApp]:
        """The routes of a model, which stays loaded meanwhile. Raises ApiError where it can't be loaded."""
        slot = self.slots[name]
        await self._enter(slot)
        try:
            assert slot.loaded is not None
            yield slot.loaded.app
        finally:
            slot.num_users -= 1
            slot.last_used = time.monotonic()

    def refuse(self, message: str) -> None:
        """Take no new requests; open ones go on."""
        self.refusal = message
        for slot in self.slots.values():
            if slot.loaded is not None:
                slot.loaded.fleet.refuse(message)

    def fail_all(self, message: str) -> None:
        """End all that is under way with an error."""
        for slot in self.slots.values():
            if slot.loaded is not None:
                slot.loaded.fleet.fail_all(message)
            for admitted in slot.take_waiting():
                admitted.set_exception(ApiError(503, message))

    def stop(self, message: str) -> None:
        """Render no more templates."""
        for slot in self.slots.values():
            if slot.loaded is not None:
                slot.loaded.text.renderer.stop(message)

    async def unload_idle(self) -> None:
        """Unload models that nobody uses, until cancelled; and those whose engines are all dead."""
        seconds = math.inf if self._idle_seconds is None else self._idle_seconds
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, seconds / 4))
            for slot in self.slots.values():
                async with self._changing:
                    loaded = slot.loaded
                    is_idle = not slot.is_busy and time.monotonic() - slot.last_used > seconds
                    if loaded is not None and (is_idle or loaded.fleet.death is not None):
                        await self._let_go(slot)

    async def close(self) -> None:
        """Unload all."""
        for load in self._loads.values():
            load.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        await asyncio.gather(*(slot.unload() for slot in self.slots.values()))

    async def _enter(self, slot: Slot) -> None:
        """Count one more user of a model, once it is loaded. Raises ApiError."""
        if slot.loaded is not None and not slot.is_leaving:
            slot.num_users += 1
            return
        if self.refusal is not None:
            raise ApiError(503, self.refusal)
        if slot.seconds_to_wait > 0:
            raise _failure(slot)
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        slot.waiting.append(admitted)
        load = self._loads.get(slot.name)
        if load is None or load.done():
            self._loads[slot.name] = asyncio.create_task(self._load(slot))
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled() and admitted.exception() is None:
                slot.num_users -= 1  # it was let in at the moment in which its client left
            raise

    async def _load(self, slot: Slot) -> None:
        """Load a model, and let those in that wait for it: before it may have to leave again."""
        error: Exception = ApiError(500, f"internal error while the model {slot.name!r} was loaded")
        try:
            async with self._changing:
                while slot.loaded is None and len(others := self._loaded()) >= self._most_loaded:
                    await self._let_go(min(others, key=lambda one: (one.is_busy, one.last_used)))
                if slot.loaded is None:
                    await slot.load()
                for admitted in slot.take_waiting():
                    slot.num_users += 1
                    admitted.set_result(None)
        except LoadError:
            error = _failure(slot)
        except asyncio.CancelledError:
            error = ApiError(503, self.refusal or "the server is shutting down")
            raise
        finally:
            for admitted in slot.take_waiting():
                admitted.set_exception(error)

    async def _let_go(self, slot: Slot) -> None:
        """Unload a model once nobody uses it; nobody begins to from now on."""
        slot.is_leaving = True
        try:
            while slot.is_busy and slot.loaded is not None and slot.loaded.fleet.death is None:
                await asyncio.sleep(POLL_SECONDS)
            await slot.unload()
        finally:
            slot.is_leaving = False

    def _loaded(self) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.loaded is not None]


def _failure(slot: Slot) -> ApiError:
    """What is told to those who ask for a model that can't be loaded."""
    after = {"Retry-After": str(max(1, math.ceil(slot.seconds_to_wait)))}
    return ApiError(503, f"the model {slot.name!r} can't be loaded: {slot.failure}", headers=after)
