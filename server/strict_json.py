"""Routes whose requests are read by bodies.py instead of FastAPI.

FastAPI accepts what is not JSON (NaN, and halves of surrogate pairs, on which the next encoder fails), keeps the body
and all decoded values until the answer has been sent, and lets a route work on for a client that has left.
"""

from __future__ import annotations

import inspect
import logging
import typing
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.params import Depends
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from octavo.server.errors import ApiError
from octavo.server.streaming import unless_hung_up

logger = logging.getLogger(__name__)

HUNG_UP = 499  # nginx's number for a client that went away; nobody reads it


class StrictRoute(APIRoute):
    """A route whose handler takes `body`, decoded and checked, and `http`; or no body, and what FastAPI knows of.

    Its dependencies are functions of the request, called before the body is read.
    """

    any_content_type = False  # see Bodies.decoded

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request: FastAPI's own handler where there is no body. Raises TypeError for what it can't."""
        if self.body_field is None:
            return super().get_route_handler()
        parameters = list(inspect.signature(self.endpoint).parameters)
        if sorted(parameters) != ["body", "http"]:
            raise TypeError(f"{self.path}: a route with a body takes `body` and `http`, not {', '.join(parameters)}")
        checks = [_check_of(dependency, self.path) for dependency in self.dependencies]
        annotation = typing.get_type_hints(self.endpoint, include_extras=True)["body"]
        kind: TypeAdapter[Any] = TypeAdapter(annotation)
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint

        async def handle(http: Request) -> Response:
            for check in checks:
                check(http)
            bodies = http.app.state.bodies
            body = await bodies.decoded(http, kind, annotation, any_content_type=self.any_content_type)
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


def _check_of(dependency: Depends, path: str) -> Callable[[Request], object]:
    """A dependency as a function of the request. Raises TypeError for one that FastAPI alone could call."""
    check = dependency.dependency
    hints = {} if check is None else typing.get_type_hints(check)
    hints.pop("return", None)
    if check is None or list(hints.values()) != [Request] or inspect.iscoroutinefunction(check):
        raise TypeError(f"{path}: a dependency of a route with a body is a plain function of the Request alone")
    return check
