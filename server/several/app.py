"""The application over several models: a request goes to the routes of the model that its body, or its path, names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from octavo.server import errors
from octavo.server.access import Access
from octavo.server.app import add_gates
from octavo.server.bodies import Bodies
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import ApiError, bad_request
from octavo.server.metrics import CONTENT_TYPE
from octavo.server.options import ServerOptions
from octavo.server.several.metrics_page import page_of
from octavo.server.several.models import Models
from octavo.server.strict_json import HUNG_UP
from octavo.version import VERSION

PREFIX = "/models/"
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"]  # without OPTIONS, which needs no key
OF_SERVER = (  # what a model's routes are told of a request; the rest is this application's own
    "type", "asgi", "http_version", "server", "client", "scheme", "method", "path", "raw_path", "query_string",
    "headers", "state", "extensions",
)  # fmt: skip


class _Named(msgspec.Struct):
    """A body, of which only the model's name is read."""

    model: str | None = None


def build_models_app(models: Models, options: ServerOptions, access: Access) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="octavo", version=VERSION, docs_url=None, openapi_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    errors.install(app)
    app.state.bodies = Bodies(options.max_body_bytes, options.max_total_body_bytes)
    app.state.door = None
    app.include_router(_own_routes(models))
    app.include_router(_routes_of_models(models, app.state.bodies))
    add_gates(app, access, options)
    return app


def _own_routes(models: Models) -> APIRouter:
    """What is told of all models together."""
    router = APIRouter()

    @router.get("/health")
    @router.api_route("/ping", methods=["GET", "POST"])
    async def health() -> Response:
        """200 until the server ends: a model that can't be loaded is told to whoever asks for it."""
        if models.refusal is not None:
            raise ApiError(503, models.refusal)
        return Response(status_code=200)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text of all models that have been loaded."""
        return Response(page_of(models.slots.values()), media_type=CONTENT_TYPE)

    @router.get("/version")
    async def version() -> dict[str, str]:
        """octavo's version."""
        return {"version": VERSION}

    @router.get("/v1/models")
    async def all_models() -> Response:
        """All models, loaded or not."""
        cards = [slot.card() for slot in models.slots.values()]
        ends = {"has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}  # Anthropic's
        return JsonResponse(encode_json({"object": "list", "data": cards, **ends}))

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """One of them."""
        return JsonResponse(encode_json(models.slots[_checked(models, name)].card()))

    return router


def _routes_of_models(models: Models, bodies: Bodies) -> APIRouter:
    """All other routes are those of one model."""
    router = APIRouter()

    @router.api_route("/{path:path}", methods=METHODS)
    async def of_one_model(http: Request) -> Response:
        """Hand the request over to the model that it names."""
        path = http.scope["path"]
        if path.startswith(PREFIX):
            name, rest = _split(models, path)
            return _HandedOver(models, name, {"path": rest, "raw_path": rest.encode()}, http.receive)
        content = bytearray()
        let_go = partial(bodies.let_go, content)
        try:
            if not await bodies.receive(http, content):
                let_go()
                return Response(status_code=HUNG_UP)
            body = bytes(content)
            name = _named_in(models, body, path)
        except BaseException:
            let_go()
            raise
        return _HandedOver(models, name, {}, _again(body, http.receive), let_go)

    return router


def _split(models: Models, path: str) -> tuple[str, str]:
    """(the model, the path within its routes) of /models/NAME/PATH; the longest name that fits."""
    given = path.removeprefix(PREFIX)
    fitting = [name for name in models.slots if given == name or given.startswith(f"{name}/")]
    if not fitting:
        raise ApiError(404, f"{path[:80]} names no model; {', '.join(models.slots)} are served", code="model_not_found")
    name = max(fitting, key=len)
    return name, given.removeprefix(name) or "/"


def _named_in(models: Models, content: bytes, path: str) -> str:
    """The model that a body names. Raises ApiError."""
    name = None
    problem = "which model is asked?"
    try:
        name = msgspec.json.decode(content, type=_Named).model if content else None
    except msgspec.DecodeError as error:
        problem = f"which model is asked can't be read: {error}."
    if name is not None:
        return _checked(models, name)
    first = next(iter(models.slots))
    raise bad_request(
        f"{problem} `model` in the body names one of {', '.join(models.slots)}, or the path does: "
        f"{PREFIX}{first}{path[:80]}",
        "model",
    )


def _checked(models: Models, name: str) -> str:
    """The model of this name, or of this alias. Raises ApiError."""
    if name in models.slots:
        return name
    for slot in models.slots.values():
        if name in slot.own_names:
            return slot.name
    for slot in models.slots.values():
        if slot.loaded is not None and slot.loaded.model.adapter(name) is not None:
            return slot.name
    raise ApiError(
        404,
        f"the model {name[:80]!r} is not served here; {', '.join(models.slots)} are",
        param="model",
        code="model_not_found",
    )


class _HandedOver(Response):
    """The answer of a model's own routes. let_go: is called when these have the request, or it has ended before."""

    def __init__(
        self,
        models: Models,
        name: str,
        changed: Mapping[str, Any],
        receive: Receive,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._models = models
        self._name = name
        self._changed = changed
        self._receive = receive
        self._let_go = let_go

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer, once the model is loaded."""
        try:
            async with self._models.used(self._name) as app:
                self._let_go()
                own = {key: scope[key] for key in OF_SERVER if key in scope}
                await app({**own, **self._changed}, self._receive, send)
        finally:
            self._let_go()


def _again(content: bytes, receive: Receive) -> Receive:
    """What gives a body that has been received once more, and then what comes."""
    pieces = [content]

    async def receive_again() -> Message:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": False}
        return await receive()

    return receive_again
