"""Routes that put a server's engines to sleep and wake them: vLLM's, and SGLang's over the same.

They end answers and take the server's memory away and back, so these are open only with --enable-sleep-mode.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from octavo.server.dialects.fields import Strict
from octavo.server.errors import CLOSED, RESPONSES, ApiError, ErrorResponse
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.sleep import ALL_MEMORY, Level, Memory, OpenRequests, Sleep, SleepError
from octavo.server.operation import no_other_page

T = TypeVar("T")

OPEN_REQUESTS: dict[str, Any] = {"model": ErrorResponse, "description": "Requests are open"}


class MemoryTags(Strict):
    """SGLang's body. tags: null for all."""

    tags: Annotated[list[Memory], Field(min_length=1, max_length=2)] | None = None


def routes(client: Fleet, found: Sleep | None) -> APIRouter:
    """/sleep, /wake_up, /is_sleeping, /release_memory_occupation, /resume_memory_occupation. found: None: not open."""

    router = APIRouter(dependencies=[Depends(no_other_page)], responses=RESPONSES | CLOSED)

    @router.post("/sleep")
    async def sleep(level: Annotated[int, Query(ge=1, le=2)] = 1, mode: OpenRequests = "abort") -> dict[str, object]:
        """Give memory back until /wake_up: the KV cache's (level 1), or all of the engines' (level 2).

        Open requests end now (abort), are waited for (wait), or go on after the wake-up (keep); new ones get 503.
        """
        asleep = _opened(found)
        freed = await _told(asleep.sleep(cast("Level", level), mode))
        return {"status": "asleep", "level": asleep.level, "freed_bytes": freed}

    @router.post("/wake_up")
    async def wake_up(tags: Annotated[list[Memory] | None, Query(max_length=2)] = None) -> dict[str, object]:
        """Take memory again; without tags all of it. Requests are answered when nothing is left to take."""
        asleep = _opened(found)
        seconds = await _told(asleep.wake(ALL_MEMORY if tags is None else tags))
        status = "asleep" if asleep.level else "awake"
        return {"status": status, "seconds": round(seconds, 3), "asleep": sorted(asleep.given_back)}

    @router.get("/is_sleeping")
    async def is_sleeping() -> dict[str, bool]:
        """Whether the engines sleep, be it in part."""
        return {"is_sleeping": found is not None and found.level > 0}

    _add_sglang_s(router, client, found)
    return router


def _add_sglang_s(router: APIRouter, client: Fleet, found: Sleep | None) -> None:
    @router.post("/release_memory_occupation", responses={409: OPEN_REQUESTS})
    async def release(body: MemoryTags | None = None) -> dict[str, object]:
        """SGLang's /sleep: kv_cache alone is level 1, and weights, which take the cache with them, are level 2."""
        asleep = _opened(found)
        if client.num_open:
            raise ApiError(409, f"{client.num_open} requests are open; /pause_generation or /sleep end them")
        tags = body.tags if body is not None else None
        freed = await _told(asleep.sleep(2 if tags is None or "weights" in tags else 1))
        return {"success": True, "message": f"{freed} bytes are free", "freed_bytes": freed}

    @router.post("/resume_memory_occupation")
    async def resume(body: MemoryTags | None = None) -> dict[str, object]:
        """SGLang's /wake_up."""
        asleep = _opened(found)
        tags = body.tags if body is not None else None
        await _told(asleep.wake(ALL_MEMORY if tags is None else tags))
        return {"success": True, "message": f"asleep: {', '.join(sorted(asleep.given_back)) or 'nothing'}"}


def _opened(found: Sleep | None) -> Sleep:
    if found is None:
        raise ApiError(403, "this server's engines can't be put to sleep; --enable-sleep-mode allows it")
    return found


async def _told(work: Awaitable[T]) -> T:
    try:
        return await work
    except SleepError as error:
        raise ApiError(503, str(error)) from None
