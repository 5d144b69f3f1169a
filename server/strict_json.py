"""A request's body as JSON by the letter: UTF-8, no NaN, no half of a surrogate pair, nothing behind the value.

json.loads, which FastAPI would use, takes all of these, and a lone surrogate then breaks whatever encodes it first.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException


class StrictRequest(Request):
    """A request whose `json` is strict."""

    async def json(self) -> Any:
        """The body, decoded; a 400 that says where it is no JSON."""
        body = await self.body()
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None


class StrictRoute(APIRoute):
    """A route whose requests are strict."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, given a StrictRequest."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
