"""POST /invocations, as SageMaker calls a model: a completion or a conversation, told apart by its fields.

SageMaker's sessions keep a client with one instance, whose prefix cache has its conversation. The instance itself only
says when one begins and ends, and that it is open.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import Discriminator, Tag

from octavo.server.dialects.chat_request import ChatCompletionRequest, begin
from octavo.server.dialects.completions import CompletionRequest, begin_completion
from octavo.server.dialects.fields import Strict
from octavo.server.dialects.native_sessions import session_refusals
from octavo.server.dialects.openai import request_id_of
from octavo.server.dialects.openai_chat import ChatAnswer
from octavo.server.errors import EVENTS, RESPONSES, bad_request
from octavo.server.service import Service, owner_of
from octavo.server.sessions import Sessions
from octavo.server.strict_json import StrictRoute

ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"
SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION_HEADER = "X-Amzn-SageMaker-New-Session-Id"
CLOSED_SESSION_HEADER = "X-Amzn-SageMaker-Closed-Session-Id"


class SessionRequest(Strict):
    """A session begins, or the one that X-Amzn-SageMaker-Session-Id names ends."""

    requestType: Literal["NEW_SESSION", "CLOSE"]  # noqa: N815  SageMaker's name


def _kind(body: object) -> str:
    if isinstance(body, dict) and "requestType" in body:
        return "<session>"
    return "<chat>" if isinstance(body, dict) and "messages" in body else "<completion>"


Invocation = Annotated[
    Annotated[ChatCompletionRequest, Tag("<chat>")]
    | Annotated[CompletionRequest, Tag("<completion>")]
    | Annotated[SessionRequest, Tag("<session>")],
    Discriminator(_kind),
]


def routes(service: Service, sessions: Sessions) -> APIRouter:
    """/invocations."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)

    @router.post("/invocations", responses=EVENTS)
    async def invocations(body: Annotated[Invocation, Body()], http: Request) -> Response:
        """Answer messages as /v1/chat/completions does, a prompt as /v1/completions. The adapter names the model."""
        if isinstance(body, SessionRequest):
            return _session(body, http, sessions)
        if (name := http.headers.get(SESSION_HEADER)) is not None:
            _use(sessions, http, name)
        body.model = http.headers.get(ADAPTER_HEADER, body.model)
        if isinstance(body, CompletionRequest):
            return await service.respond(http, await begin_completion(body, http, service))
        choices = await begin(body, http, service)
        return await service.respond(http, ChatAnswer(body, choices, service.model, request_id_of(http, body)))

    return router


def _session(body: SessionRequest, http: Request, sessions: Sessions) -> Response:
    """Begin or end a session. Raises ApiError."""
    owner = owner_of(http)
    if body.requestType == "NEW_SESSION":
        name = str(uuid.uuid4())
        with session_refusals():
            sessions.open(owner, name, is_streaming=False, seconds=None)
        until = datetime.now(UTC) + timedelta(seconds=_use(sessions, http, name))
        header = {NEW_SESSION_HEADER: f"{name}; Expires={until:%Y-%m-%dT%H:%M:%SZ}"}
        return Response(f"Session {name} created", headers=header, media_type="text/plain")
    name = http.headers.get(SESSION_HEADER, "")
    _use(sessions, http, name)
    sessions.close(owner, name)
    return Response(f"Session {name} closed", headers={CLOSED_SESSION_HEADER: name}, media_type="text/plain")


def _use(sessions: Sessions, http: Request, name: str) -> float:
    """In how many seconds a session is closed. Raises ApiError where it isn't open."""
    seconds = sessions.use(owner_of(http), name)
    if seconds is None:
        raise bad_request(f"{SESSION_HEADER}: no session {name[:80]!r} is open", SESSION_HEADER)
    return seconds
