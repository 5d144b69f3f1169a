"""SGLang's sessions: /open_session, /close_session, and the session_params of /generate."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, StringConstraints

from octavo.server.dialects.fields import Count, Flag, Integer, Number, Strict, Text
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import ApiError, bad_request
from octavo.server.generation import Choice, Steps
from octavo.server.service import owner_of
from octavo.server.sessions import Continuation, FullError, SessionError, Sessions, Turn

SessionName = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]


class OpenSession(Strict):
    """POST /open_session. The answer is the session's id. timeout: seconds without use, after which it is closed.

    streaming: it goes on at its end alone. capacity_of_str_len bounds nothing, as in SGLang: sessions are bounded in
    tokens, by --max-session-tokens.
    """

    capacity_of_str_len: Count | None = None
    session_id: SessionName | None = None
    streaming: Flag | None = None
    timeout: Annotated[Number, Field(gt=0)] | None = None


class CloseSession(Strict):
    """POST /close_session."""

    session_id: SessionName


class SessionParams(Strict):
    """Where a request goes on in its session: behind the prompt and the answer of the request that `rid` names.

    Without rid it begins anew. replace: what has gone on from that request before is dropped, and without rid all of
    the session. drop_previous_output: behind that request's prompt. offset: behind so many of its tokens; a negative
    one leaves out so many at its end.
    """

    id: SessionName | None = None
    rid: Text | None = None
    offset: Annotated[Integer, Field(gt=-(2**31), lt=2**31)] | None = None
    replace: Flag | None = None
    drop_previous_output: Flag | None = None

    def continuation(self) -> Continuation | None:
        """The same as the sessions take it; None where nothing is asked for."""
        if self.id is None:
            if self.model_dump(exclude_none=True):
                raise bad_request("session_params.id: which session is meant?", "session_params")
            return None
        return Continuation(self.id, self.rid, self.offset or 0, bool(self.replace), bool(self.drop_previous_output))


def add_session_routes(router: APIRouter, sessions: Sessions) -> None:
    """/open_session, /close_session: with a body, whatever the method."""

    @router.api_route("/open_session", methods=["GET"], include_in_schema=False)
    @router.post("/open_session")
    async def open_session(body: OpenSession, http: Request) -> Response:
        """Begin a session, under this id or a new one."""
        name = body.session_id or uuid.uuid4().hex
        with session_refusals():
            sessions.open(owner_of(http), name, is_streaming=bool(body.streaming), seconds=body.timeout)
        return JsonResponse(encode_json(name))

    @router.api_route("/close_session", methods=["GET"], include_in_schema=False)
    @router.post("/close_session", response_class=Response)
    async def close_session(body: CloseSession, http: Request) -> Response:
        """End a session, if it is open. What is still being answered in it goes on."""
        sessions.close(owner_of(http), body.session_id)
        return Response(status_code=200)


@contextmanager
def begun_turn(sessions: Sessions, http: Request, asked: Continuation, rid: str) -> Iterator[Turn]:
    """A request of a session, while it is prepared: forgotten where that fails. Raises ApiError."""
    with session_refusals():
        turn = sessions.begin(owner_of(http), asked, rid)
    try:
        with session_refusals():
            yield turn
        if turn.is_over:
            raise bad_request("session_params: another request has taken the place of this one", "session_params")
    except BaseException:
        sessions.abandon(turn)
        raise


def reserve(sessions: Sessions, turn: Turn, choices: Sequence[Choice]) -> None:
    """Tell the sessions what a turn asks of the engine. Raises FullError."""
    [choice] = choices
    turn.request_ids = [choice.request.request_id]
    sessions.reserve(turn, choice.request.token_ids, choice.num_wanted)


async def kept(sessions: Sessions, turn: Turn, steps: Steps) -> Steps:
    """The same steps, whose tokens the session keeps when they are over, be it by a client that hung up."""
    is_whole = False
    try:
        async with aclosing(steps):
            async for deltas in steps:
                for delta in deltas:
                    turn.answer += delta.token_ids
                    is_whole = delta.finish_reason not in (None, "abort")
                yield deltas
    finally:
        sessions.end(turn, is_whole=is_whole)


@contextmanager
def session_refusals() -> Iterator[None]:
    """What sessions refuse, as errors of the API, which blame the field that the message begins with."""
    try:
        yield
    except SessionError as error:
        message = str(error)
        raise bad_request(message, re.split("[.:]", message, maxsplit=1)[0]) from None
    except FullError as error:
        raise ApiError(429, str(error), code="sessions_full") from None
