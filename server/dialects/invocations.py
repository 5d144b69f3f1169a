"""POST /invocations, as SageMaker calls a model: a completion or a conversation, told apart by its fields."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import Discriminator, Tag

from octavo.server.dialects.chat_request import ChatCompletionRequest, begin
from octavo.server.dialects.completions import CompletionRequest, begin_completion
from octavo.server.dialects.openai import request_id_of
from octavo.server.dialects.openai_chat import ChatAnswer
from octavo.server.errors import EVENTS, RESPONSES
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute

ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"


def _kind(body: object) -> str:
    return "<chat>" if isinstance(body, dict) and "messages" in body else "<completion>"


Invocation = Annotated[
    Annotated[ChatCompletionRequest, Tag("<chat>")] | Annotated[CompletionRequest, Tag("<completion>")],
    Discriminator(_kind),
]


def routes(service: Service) -> APIRouter:
    """/invocations."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)

    @router.post("/invocations", responses=EVENTS)
    async def invocations(body: Annotated[Invocation, Body()], http: Request) -> Response:
        """Answer messages as /v1/chat/completions does, a prompt as /v1/completions. The adapter names the model."""
        body.model = http.headers.get(ADAPTER_HEADER, body.model)
        if isinstance(body, CompletionRequest):
            return await service.respond(http, await begin_completion(body, http, service))
        choices = await begin(body, http, service)
        return await service.respond(http, ChatAnswer(body, choices, service.model, request_id_of(http, body)))

    return router
