"""/v1/responses: OpenAI's newer dialect of conversations, whose answers are kept and can go on in the background."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from octavo.server.dialects.chat_request import begin, in_words_of
from octavo.server.dialects.responses_answer import NAMED_EVENTS, ResponseAnswer, not_stored
from octavo.server.dialects.responses_items import messages_of, plain_items, response_of_item
from octavo.server.dialects.responses_request import (
    NAMES_IN_CHAT,
    InputFields,
    InputTokensRequest,
    ResponsesRequest,
    chat_request,
)
from octavo.server.dialects.responses_runs import Run, Runs
from octavo.server.dialects.system_turns import SystemProbe, folded
from octavo.server.encoding import JsonResponse, encode_in_turns, encode_json
from octavo.server.errors import EVENTS, RESPONSES, ApiError, bad_request
from octavo.server.generation import Choice
from octavo.server.service import Service, owner_of
from octavo.server.store import MissingError, ResponseStore, Stored, StoreError
from octavo.server.streaming import EventStream
from octavo.server.strict_json import StrictRoute

Json = dict[str, Any]

NO_STORE = "this server keeps no responses (it would with --response-store memory, or a file)"


def routes(service: Service, store: ResponseStore | None) -> APIRouter:
    """/v1/responses, and all below it."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    responses = Responses(service, store)

    @router.post("/v1/responses", responses=EVENTS)
    async def create(body: ResponsesRequest, http: Request) -> Response:
        """Answer a conversation of items."""
        return await responses.create(body, http)

    @router.post("/v1/responses/input_tokens")
    async def input_tokens(body: InputTokensRequest, http: Request) -> Response:
        """Count the tokens of the prompt that a request would make."""
        count = await responses.count(body, http)
        return JsonResponse(encode_json({"object": "response.input_tokens", "input_tokens": count}))

    @router.get("/v1/responses/{response_id}", responses=EVENTS)
    async def retrieve(
        response_id: str, http: Request, stream: bool = False, starting_after: Annotated[int, Query(ge=-1)] = -1
    ) -> Response:
        """A response as it is now, or its events behind the one of number `starting_after`."""
        if stream:
            return EventStream(await responses.follow(response_id, http, starting_after + 1), NAMED_EVENTS)
        return JsonResponse(encode_json(await responses.get(response_id, http)))

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str, http: Request) -> Response:
        """End a response that runs in the background."""
        return JsonResponse(encode_json(await responses.cancel(response_id, http)))

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, http: Request) -> Response:
        """Forget a response; one that still runs is ended."""
        await responses.delete(response_id, http)
        return JsonResponse(encode_json({"id": response_id, "object": "response", "deleted": True}))

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(
        response_id: str,
        http: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
        after: str | None = None,
    ) -> Response:
        """The items that a response's own request brought; those of earlier responses are theirs."""
        items = await responses.input_items(response_id, http)
        return JsonResponse(encode_json(page_of(items if order == "asc" else items[::-1], limit, after)))

    return router


def page_of(items: list[Json], limit: int, after: str | None) -> Json:
    """One page of a list, in OpenAI's shape: what follows the item of this id. Raises ApiError."""
    start = 0
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise bad_request(f"after: no item here has the id {after[:80]!r}", "after")
        start = places[0] + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > start + limit,
    }


class Responses:
    """What the routes do."""

    def __init__(self, service: Service, store: ResponseStore | None) -> None:
        self._service = service
        self._store = store
        self._runs = Runs()
        self._probe = SystemProbe(service.model)

    async def create(self, body: ResponsesRequest, http: Request) -> Response:
        """Answer: at once, as events, or in the background. Raises ApiError."""
        service = self._service
        service.check(body.model, http)
        owner = owner_of(http)
        stores = self._stores(body)
        response_id = self._new_id()
        before, own = await self._items(body, response_id, owner)
        if stores and self._store is not None and len(encode_json(own)) > self._store.max_bytes // 2:
            raise bad_request("input: it is too large for this server's store; send it with store: false", "input")
        choices = await self._begin(body, [*before, *own], http)
        answer = ResponseAnswer(body, choices, service.model, response_id, stores=stores)
        if stores and self._store is not None:
            store = self._store

            def keep(ended: ResponseAnswer, events: list[bytes]) -> Future[None] | None:
                is_known = body.stream or body.background or ended.status in ("completed", "incomplete")
                if not is_known:  # nobody was told its id
                    return None
                return store.put(owner, ended.object(), own, events, active=False)

            answer.on_end = keep
        if body.background:
            return await self._run(answer, owner, own, http)
        steps = service.steps(http, choices, answer.hints)
        if answer.streams:
            return EventStream(answer.events(steps), NAMED_EVENTS)
        return JsonResponse(*await encode_in_turns(await answer.complete(steps)))

    def _new_id(self) -> str:
        """Where several processes serve, it ends in the number of this one (processes/home.py)."""
        ending = self._service.model.response_ending
        return f"resp_{uuid.uuid4().hex[: 32 - len(ending)]}{ending}"

    async def count(self, body: InputTokensRequest, http: Request) -> int:
        """The tokens of a prompt. Raises ApiError."""
        before, own = await self._items(body, f"resp_{'0' * 32}", owner_of(http))
        [choice] = await self._begin(body, [*before, *own], http)
        return len(choice.request.prompt_ids)

    async def get(self, response_id: str, http: Request) -> Json:
        """The response object. Raises ApiError."""
        owner = owner_of(http)
        run = self._runs.get(response_id, owner)
        return (await self._stored(response_id, owner)).response if run is None else await run.now()

    async def follow(self, response_id: str, http: Request, start: int) -> AsyncGenerator[bytes, None]:
        """Its events from this number on. Raises ApiError."""
        owner = owner_of(http)
        run = self._runs.get(response_id, owner)
        if run is not None:
            return run.follow(start)
        await self._stored(response_id, owner)
        assert self._store is not None
        try:
            return _at_once((await self._store.events(response_id, owner))[start:])
        except MissingError:
            raise _missing(response_id) from None

    async def cancel(self, response_id: str, http: Request) -> Json:
        """The response, ended. Raises ApiError for one that has ended otherwise, or isn't in the background."""
        owner = owner_of(http)
        run = self._runs.get(response_id, owner)
        if run is not None and not run.answer.has_ended:
            await run.cancel()
            if run.answer.stored is not None:
                try:
                    await asyncio.shield(asyncio.wrap_future(run.answer.stored))
                except StoreError as error:
                    raise not_stored(error) from error
            return run.answer.object()
        response = await self.get(response_id, http)
        if response["status"] != "cancelled":
            why = f"it has ended already, as {response['status']}"
            if not response["background"]:
                why = "only one that was made with background: true can be; hang up to end another"
            raise bad_request(f"response {response_id!r} can't be cancelled: {why}")
        return response

    async def delete(self, response_id: str, http: Request) -> None:
        """Raises ApiError where it isn't there."""
        owner = owner_of(http)
        run = self._runs.get(response_id, owner)
        if run is not None:
            await run.cancel()
            self._runs.forget(response_id)
        is_gone = self._store is not None and await self._store.delete(response_id, owner)
        if run is None and not is_gone:
            raise _missing(response_id)

    async def input_items(self, response_id: str, http: Request) -> list[Json]:
        """The items of its request. Raises ApiError."""
        return (await self._stored(response_id, owner_of(http))).input

    def _stores(self, body: ResponsesRequest) -> bool:
        """Whether this response is kept. Raises ApiError where it must be, and can't."""
        if self._store is not None:
            return body.store is not False
        for name in ("store", "background"):
            if getattr(body, name):
                raise bad_request(f"{name}: {NO_STORE}", name)
        return False

    async def _run(self, answer: ResponseAnswer, owner: str, own: list[Json], http: Request) -> Response:
        self._runs.check()
        steps = self._service.steps(http, answer.choices, answer.hints)
        assert self._store is not None
        run = Run(answer, owner)
        queued = answer.object()
        try:
            await self._store.begin(owner, queued, own)
        except StoreError as error:
            raise not_stored(error) from error
        self._runs.start(run, steps)
        if answer.streams:
            return EventStream(run.follow(0), NAMED_EVENTS)
        return JsonResponse(*await encode_in_turns(queued))

    async def _stored(self, response_id: str, owner: str) -> Stored:
        if self._store is None:
            raise ApiError(404, f"response {response_id[:80]!r} is not here: {NO_STORE}")
        try:
            return await self._store.get(response_id, owner)
        except MissingError:
            raise _missing(response_id) from None

    async def _items(self, body: InputFields, response_id: str, owner: str) -> tuple[list[Json], list[Json]]:
        """The items of the conversation before this request, and those that it brings."""
        before = [] if body.previous_response_id is None else await self._before(body.previous_response_id, owner)
        own = plain_items(body.input, response_id)
        if not before and not own and not body.instructions:
            raise bad_request("input: there is nothing to answer", "input")
        by_id = {item["id"]: item for item in before}
        for place, item in enumerate(own):
            if item["type"] == "item_reference":
                own[place] = by_id.get(item["id"]) or await self._referred(item["id"], owner)
        return before, own

    async def _before(self, response_id: str, owner: str) -> list[Json]:
        if self._store is None:
            raise bad_request(f"previous_response_id: {NO_STORE}", "previous_response_id")
        try:
            chain = await self._store.conversation(response_id, owner)
        except MissingError as error:
            missing = str(error)
            what = "is not here" if missing == response_id else f"goes on from {missing!r}, which isn't here any more"
            raise ApiError(
                404,
                f"previous_response_id: the response {response_id[:80]!r} {what}",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None
        if chain[-1].response["status"] in ("queued", "in_progress"):
            raise bad_request(
                f"previous_response_id: {response_id!r} is still being made; wait for its end", "previous_response_id"
            )
        return [item for stored in chain for item in (*stored.input, *stored.response["output"])]

    async def _referred(self, item_id: str, owner: str) -> Json:
        """The item of a stored response that has this id."""
        response_id = response_of_item(item_id)
        if response_id is not None and self._store is not None:
            try:
                stored = await self._store.get(response_id, owner)
            except MissingError:
                stored = Stored({"output": []}, [])
            items: list[Json] = [*stored.input, *stored.response["output"]]
            for item in items:
                if item["id"] == item_id:
                    return item
        raise ApiError(404, f"input: the item {item_id[:80]!r} is not here", param="input")

    async def _begin(self, body: InputFields, items: list[Json], http: Request) -> list[Choice]:
        """The answer at its beginning; with truncation: auto, the oldest turns give way until there is room for it."""
        messages = messages_of(items, body.instructions)
        if body.truncation != "auto":
            return await self._begun(body, messages, http)
        num_first = next((place for place, message in enumerate(messages) if message["role"] != "system"), 0)
        cuts = [place for place, message in enumerate(messages) if message["role"] == "user" and place > num_first]
        fitting = await self._fitting(body, messages, http)
        low = 0
        high = 0 if fitting else len(cuts)
        while low < high:
            middle = (low + high) // 2
            if shorter := await self._fitting(body, messages[:num_first] + messages[cuts[middle] :], http):
                fitting = shorter
                high = middle
            else:
                low = middle + 1
        return fitting or await self._begun(body, messages[:num_first] + messages[(cuts or [num_first])[-1] :], http)

    async def _fitting(self, body: InputFields, messages: list[Json], http: Request) -> list[Choice] | None:
        """The answer at its beginning, if the context has room for what is asked for, or for a quarter of itself."""
        try:
            choices = await self._begun(body, messages, http)
        except ApiError as error:
            if error.code == "context_length_exceeded":
                return None
            raise
        context = self._service.model.max_model_len
        wanted = body.max_output_tokens if isinstance(body, ResponsesRequest) else None
        room = context - len(choices[0].request.token_ids)
        return choices if room >= min(wanted or context, context // 4) else None

    async def _begun(self, body: InputFields, messages: list[Json], http: Request) -> list[Choice]:
        takes = await self._probe.turns(has_tools=bool(body.flat_tools))
        with in_words_of(NAMES_IN_CHAT):
            chat = await self._service.off_loop(http, lambda: chat_request(body, folded(messages, takes)))
            return await begin(chat, http, self._service, clamps=True)


async def _at_once(pieces: list[bytes]) -> AsyncGenerator[bytes, None]:
    """Events that are all there."""
    if pieces:
        yield b"".join(pieces)


def _missing(response_id: str) -> ApiError:
    return ApiError(404, f"no response of the id {response_id[:80]!r} is here")
