"""Routes whose requests are read by bodies.py instead of FastAPI.

FastAPI accepts what is not JSON (NaN, and halves of surrogate pairs, on which the next encoder fails), keeps the body
and all decoded values until the answer has been sent, and lets a route work on for a client that has left.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from octavo.server.errors import ApiError
from octavo.server.streaming import unless_hung_up

logger = logging.getLogger(__name__)

HUNG_UP = 499  # nginx's number for a client that went away; nobody reads it


class StrictRoute(APIRoute):
    """A route whose handler takes `body`, decoded and checked, and `http`; or neither."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request: FastAPI's own handler where there is no body."""
        if self.body_field is None:
            return super().get_route_handler()
        annotation = typing.get_type_hints(self.endpoint, include_extras=True)["body"]
        kind: TypeAdapter[Any] = TypeAdapter(annotation)
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint

        async def handle(http: Request) -> Response:
            body = await http.app.state.bodies.decoded(http, kind, annotation)
            if body is None:
                return Response(status_code=HUNG_UP)
            try:
                response = await unless_hung_up(http.receive, lambda: endpoint(body=body, http=http))
            except BaseException as error:
                if type(error).__name__ != "PanicException":
                    raise
                # from a library in Rust; it isn't an Exception, and uvicorn would answer it in plain text
                logger.exception("a library panicked")
                raise ApiError(500, "internal error: PanicException") from None
            return Response(status_code=HUNG_UP) if response is None else response

        return handle
