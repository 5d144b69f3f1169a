"""The routes. Each one checks, hands the request to the engine, and shapes the answer; all text work is done here.

`build_app` gets everything that it needs as values: the model's text side, the engine's client, the metrics.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, TypeVar

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

from octavo.server import errors
from octavo.server.access import ANY_HOST, Access
from octavo.server.bodies import Bodies
from octavo.server.dialects.answers import Answer, ChatAnswer, CompletionAnswer, events, fold
from octavo.server.dialects.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeRequest,
    TokenizeResponse,
)
from octavo.server.engine_client import EngineClient
from octavo.server.errors import RESPONSES, ApiError
from octavo.server.generation import generate
from octavo.server.metrics import CONTENT_TYPE, Metrics
from octavo.server.middleware import AllowedHosts, Authentication
from octavo.server.options import ServerOptions
from octavo.server.prompts import (
    chat_prompt,
    chat_token_ids,
    completion_prompts,
    encode,
    in_vocabulary,
    render_request,
    rendered,
)
from octavo.server.served_model import ServedModel
from octavo.server.streaming import EventStream, encode_json, unless_hung_up
from octavo.server.strict_json import HUNG_UP, StrictRoute
from octavo.version import VERSION

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 30.0  # one step of a large model on a slow machine may take seconds; nothing healthy takes this
LONG_BODY = 1 << 16  # bytes
VERY_LONG_BODY = 1 << 20

T = TypeVar("T")


def build_app(
    model: ServedModel, client: EngineClient, metrics: Metrics, options: ServerOptions, access: Access
) -> FastAPI:
    """The ASGI application over one engine."""
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
    app.state.bodies = Bodies(options.max_body_bytes, options.max_total_body_bytes)
    app.state.long_work = ThreadPoolExecutor(1, "octavo-long")
    routes = _Routes(model, client, metrics, options)
    app.include_router(routes.generation())
    app.include_router(routes.text())
    app.include_router(routes.operation())
    if access.keys:
        app.add_middleware(Authentication, access=access)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    if ANY_HOST not in access.hosts:
        app.add_middleware(AllowedHosts, hosts=access.hosts)
    return app


class _Routes:
    """The handlers, over the values that they share."""

    def __init__(self, model: ServedModel, client: EngineClient, metrics: Metrics, options: ServerOptions) -> None:
        self._model = model
        self._client = client
        self._metrics = metrics
        self._options = options

    def generation(self) -> APIRouter:
        """/v1/completions and /v1/chat/completions."""
        router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
        model = self._model

        @router.post("/v1/completions")
        async def completions(body: CompletionRequest, http: Request) -> Response:
            """Complete one prompt or several."""
            self._check(body.model)
            answer = await _off_loop(http, lambda: CompletionAnswer(body, completion_prompts(body, model), model))
            return await self._answer(http, answer)

        @router.post("/v1/chat/completions")
        async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
            """Answer a conversation."""
            self._check(body.model)
            asked = await _off_loop(http, lambda: render_request(body, model, body.documents))
            text = await rendered(asked, model)
            answer = await _off_loop(http, lambda: ChatAnswer(body, chat_prompt(text, body, model), model))
            return await self._answer(http, answer)

        return router

    def text(self) -> APIRouter:
        """/tokenize, /detokenize and the models' names."""
        router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
        model = self._model

        @router.post("/tokenize", response_model=TokenizeResponse)
        async def tokenize(body: Annotated[TokenizeRequest, Body()], http: Request) -> Response:
            """The token ids of a text, or of the prompt that the chat template makes of messages."""
            self._check_name(body.model)
            text = None
            if isinstance(body, TokenizeChatRequest):
                asked = await _off_loop(http, partial(render_request, body, model))
                text = await rendered(asked, model)
            return _json(await _off_loop(http, lambda: _tokenized(body, text, model)))

        @router.post("/detokenize", response_model=DetokenizeResponse)
        async def detokenize(body: DetokenizeRequest, http: Request) -> Response:
            """The text of these token ids, special tokens written out."""
            self._check_name(body.model)
            return _json(await _off_loop(http, lambda: _detokenized(body, model)))

        @router.get("/v1/models")
        async def models() -> Response:
            """All names of the model that is served."""
            return _json(encode_json({"object": "list", "data": [model.card(name) for name in model.names]}))

        @router.get("/v1/models/{name:path}")
        async def one_model(name: str) -> Response:
            """The model under one of its names."""
            self._check_name(name)
            return _json(encode_json(model.card(name)))

        return router

    def operation(self) -> APIRouter:
        """/health, /metrics, /version."""
        router = APIRouter()

        @router.get("/health", responses={503: RESPONSES[503]})
        async def health() -> Response:
            """200 when the engine itself answers; 503 when it is dead, hangs, or the server is shutting down."""
            if not await self._client.ping(HEALTH_SECONDS):
                reason = self._client.refusal or f"the engine did not answer within {HEALTH_SECONDS:.0f} s"
                raise ApiError(503, reason)
            return Response(status_code=200)

        @router.get("/ping", include_in_schema=False)
        async def ping() -> Response:
            """/health under SageMaker's name."""
            return await health()

        @router.get("/metrics")
        async def metrics() -> Response:
            """Prometheus text."""
            return Response(self._metrics.page(), media_type=CONTENT_TYPE)

        @router.get("/version")
        async def version() -> dict[str, str]:
            """octavo's version."""
            return {"version": VERSION}

        return router

    def _check(self, name: str | None) -> None:
        self._check_name(name)
        if self._client.refusal is not None:
            raise ApiError(503, self._client.refusal)

    def _check_name(self, name: str | None) -> None:
        if name is not None and name not in self._model.names:
            served = ", ".join(self._model.names)
            raise ApiError(
                404, f"the model {name[:80]!r} is not served here; {served} is", param="model", code="model_not_found"
            )

    async def _answer(self, http: Request, answer: Answer) -> Response:
        request = answer.request
        if self._options.enable_log_requests:
            params = answer.choices[0].request.params
            logger.info("%s: %d choices, %s", http.url.path, len(answer.choices), params)
        steps = generate(answer.choices, self._client, self._metrics)
        if request.stream:
            return EventStream(events(answer, steps))
        deltas = await unless_hung_up(http.receive, fold(answer, steps))
        if deltas is None:
            return Response(status_code=HUNG_UP)
        return _json(await _off_loop(http, lambda: encode_json(answer.whole(deltas))))


async def _off_loop(http: Request, work: Callable[[], T]) -> T:
    """Do what takes long for a long prompt: here when it is short, in a thread when it would hold up the others.

    What a very long body asks for is done one at a time: tokenizing 4 MB takes 150 MB, which a thread's heap keeps.
    """
    length = int(http.headers.get("content-length", VERY_LONG_BODY))
    if length < LONG_BODY:
        return work()
    if length < VERY_LONG_BODY:
        return await asyncio.to_thread(work)
    return await asyncio.get_running_loop().run_in_executor(http.app.state.long_work, work)


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _tokenized(
    body: TokenizeCompletionRequest | TokenizeChatRequest, chat_text: str | None, model: ServedModel
) -> bytes:
    """The answer to /tokenize; chat_text is what the chat template made of a TokenizeChatRequest."""
    if isinstance(body, TokenizeChatRequest):
        assert chat_text is not None
        ids = chat_token_ids(chat_text, body, model, must_fit=False)
    else:
        ids = encode(body.prompt, "prompt", model, add_special_tokens=body.add_special_tokens, must_fit=False)
    strings = [model.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return encode_json({"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": strings})


def _detokenized(body: DetokenizeRequest, model: ServedModel) -> bytes:
    in_vocabulary(body.tokens, "tokens", model)
    return encode_json({"prompt": model.tokenizer.decode(body.tokens)})
