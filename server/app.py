"""The application: the routes of all dialects, and those that tell how the server is.

`build_app` gets everything that it needs as values: the model's text side, the engine's client, the metrics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.types import Scope

from octavo.server import errors, operation, sleep_routes, weight_routes
from octavo.server.access import ANY_HOST, Access
from octavo.server.admission import QueueLimits
from octavo.server.batch_lines import routes_of
from octavo.server.batch_run import SpareCapacity
from octavo.server.batches import Batches
from octavo.server.bodies import Bodies
from octavo.server.dialects import (
    adapters,
    anthropic,
    audio,
    batches,
    completions,
    decisions,
    invocations,
    label_scores,
    native,
    ollama,
    ollama_embed,
    openai_chat,
    parsers,
    pooled,
    pooled_others,
    pooled_scores,
    responses,
    tokens,
)
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import RESPONSES
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.sleep import Sleep
from octavo.server.kept import Kept
from octavo.server.metrics import Metrics
from octavo.server.middleware import AllowedHosts, Authentication, FullQueue, QueueDoor, Reports, RequestIds
from octavo.server.options import ServerOptions
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.sessions import SessionLimits, Sessions
from octavo.server.strict_json import StrictRoute
from octavo.server.web import page
from octavo.server.weight_routes import Updates
from octavo.version import VERSION

with warnings.catch_warnings(action="ignore"):  # it says that it doesn't work under Python 3.14; nothing here uses it
    import pydantic.v1  # noqa: F401  FastAPI's first route imports it, which is made when clients wait already

DIALECTS = (
    completions,
    openai_chat,
    anthropic,
    ollama,
    decisions,
    tokens,
    parsers,
    label_scores,
    pooled,
    pooled_scores,
    pooled_others,
    ollama_embed,
    audio,
)
"""Those whose routes need the service alone."""


def build_app(
    model: ServedModel,
    client: Fleet,
    metrics: Metrics,
    options: ServerOptions,
    access: Access,
    kept: Kept,
    sleep: Sleep | None = None,
    updates: Updates | None = None,
) -> FastAPI:
    """The ASGI application over one engine. Call it where an event loop runs: batches may go on at once.

    sleep: what requests may put to sleep; None: nothing. updates: what they may give other weights; None: nothing.
    """
    limits = QueueLimits(
        model.max_num_seqs,
        options.max_queued_requests,
        options.max_queued_tokens,
        options.queue_timeout,
        in_order=model.scheduling_policy == "fcfs",
    )
    app = FastAPI(
        title="octavo",
        version=VERSION,
        root_path=options.root_path,
        docs_url=None if options.disable_fastapi_docs else "/docs",
        openapi_url=None if options.disable_fastapi_docs else "/openapi.json",
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(app)
    of_page = list(page.routes(options.root_path, model.directory)) if options.ui else []
    app.router.routes.extend(of_page[:1])  # its `/` before Ollama's
    app.state.bodies = Bodies(options.max_body_bytes, options.max_total_body_bytes)
    service = Service(model, client, metrics, limits, options)
    for routes in (*(dialect.routes for dialect in DIALECTS), _models):
        app.include_router(routes(service))
    limits_of_sessions = SessionLimits(options.max_sessions, options.max_session_tokens, options.session_timeout)
    sessions = Sessions(limits_of_sessions)
    app.include_router(native.routes(service, sessions))
    app.include_router(invocations.routes(service, sessions))
    app.include_router(responses.routes(service, kept.responses))
    made = Batches(app, kept.files, SpareCapacity(client, model.max_num_seqs))
    app.include_router(batches.routes(kept.files, made, lambda: routes_of(app.openapi())))
    made.resume()
    app.include_router(operation.engine_routes(client, metrics, access))
    app.include_router(operation.pause_routes(client))
    app.include_router(operation.abort_routes(service))
    app.include_router(sleep_routes.routes(client, sleep))
    app.include_router(weight_routes.routes(client, updates))
    app.include_router(operation.model_routes(model))
    app.include_router(adapters.routes(client.adapters))
    app.router.routes.extend(of_page[1:])  # behind what most requests are for
    app.state.admission = service.admission
    app.state.door = QueueDoor(service.admission, metrics, access)
    _add_middleware(app, access, options)
    app.add_middleware(Reports, metrics=metrics, client=client)
    app.add_middleware(RequestIds)  # the outermost: refusals are named too
    return app


def _add_middleware(app: FastAPI, access: Access, options: ServerOptions) -> None:
    """Who is answered, from the innermost on."""
    app.add_middleware(FullQueue, admission=app.state.admission)  # the innermost: who may not ask learns nothing
    add_gates(app, access, options, page.is_public if options.ui else None)


def add_gates(
    app: FastAPI, access: Access, options: ServerOptions, is_public: Callable[[Scope], bool] | None = None
) -> None:
    """Who may ask at all. is_public: of which requests that carry no key."""
    if access.keys:
        app.add_middleware(Authentication, access=access, is_public=is_public)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    if ANY_HOST not in access.hosts:
        app.add_middleware(AllowedHosts, hosts=access.hosts)


def _models(service: Service) -> APIRouter:
    """The names of the model."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    model = service.model

    @router.get("/v1/models")
    async def models() -> Response:
        """All names of the model that is served."""
        names = model.all_names
        ends = {"has_more": False, "first_id": names[0], "last_id": names[-1]}  # Anthropic's
        return JsonResponse(encode_json({"object": "list", "data": [model.card(name) for name in names], **ends}))

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """The model under one of its names."""
        service.check_name(name)
        return JsonResponse(encode_json(model.card(name)))

    return router
