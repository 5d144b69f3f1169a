"""SGLang's own routes: /generate and what goes with it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from octavo.runtime.messages import Logprobs, PoolingParams
from octavo.server.dialects.chat_request import in_words_of
from octavo.server.dialects.fields import Flag, Strict, Text
from octavo.server.dialects.logprobs import finite
from octavo.server.dialects.native_request import (
    GenerateRequest,
    Item,
    NativeSampling,
    choices_of,
    continued,
    images_of,
    items_of,
    names_in,
    rid_of,
)
from octavo.server.dialects.native_sessions import add_session_routes, begun_turn, kept, reserve
from octavo.server.errors import EVENTS, RESPONSES, TEXT, ApiError, bad_request
from octavo.server.generation import Choice, Delta, Steps, fold, in_batches
from octavo.server.hints import hints_in
from octavo.server.media.prompt import ReadImage
from octavo.server.message.parts import text_of
from octavo.server.operation import no_other_page
from octavo.server.pooled_inputs import PooledPrompt
from octavo.server.served_model import ServedModel
from octavo.server.service import Answer, Service, owner_of
from octavo.server.sessions import Continuation, Sessions
from octavo.server.streaming import event
from octavo.server.strict_json import StrictRoute
from octavo.server.transcription import choice_of_silence
from octavo.version import VERSION

Json = dict[str, Any]
Owners = WeakKeyDictionary["NativeAnswer", str]
"""Whose API key each running answer is for."""


class AbortRequest(Strict):
    """POST /abort_request: one request, or all whose rid begins so."""

    rid: Text = ""
    abort_all: Flag = False


def routes(service: Service, sessions: Sessions) -> APIRouter:
    """/generate, its sessions, /flush_cache, /abort_request, /health_generate, and what the model is."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    model = service.model
    owners: Owners = WeakKeyDictionary()
    _add_generate(router, service, sessions, owners)
    add_session_routes(router, sessions)

    @router.get("/health_generate", response_class=Response)
    async def health_generate(http: Request) -> Response:
        """200 when the engine has generated a token, or pooled one."""
        await _ask_for_little(http, service)
        return Response(status_code=200)

    @router.api_route(
        "/flush_cache",
        methods=["GET", "POST"],
        dependencies=[Depends(no_other_page)],
        response_class=Response,
        responses=TEXT,
    )
    async def flush_cache(http: Request) -> Response:
        """Forget all cached prefixes that no running request holds."""
        if http.headers.get("sec-fetch-site") == "cross-site":  # an image of any page could ask
            raise ApiError(403, "/flush_cache is not for web pages of other origins")
        service.forget_prefixes()
        return Response("Cache flushed.\n", media_type="text/plain")

    @router.post("/abort_request", response_class=Response)
    async def abort_request(body: AbortRequest, http: Request) -> Response:
        """End a request by its rid, or all of them, with the finish reason `abort`: only those of the same API key."""
        mine = owner_of(http)
        if body.abort_all:
            service.abort_all_of(mine)
        elif not body.rid:
            raise bad_request("rid: which request is to end? abort_all ends all", "rid")
        else:
            answers = [answer for answer, owner in owners.items() if owner == mine]
            service.abort([each for answer in answers for each in answer.requests_of(body.rid)])
        return Response(status_code=200)

    _add_facts(router, model)
    return router


async def _ask_for_little(http: Request, service: Service) -> None:
    """Have the engine do the least that the model does. Raises ApiError."""
    model = service.model
    if model.pooled is not None:
        task = model.pooled.facts.tasks[0]
        service.check_pooled(None, http, task)
        await service.pooled(http, [PooledPrompt([0])], PoolingParams(task), 0)
        return
    if model.speech is not None:
        choices = [choice_of_silence(model, service.check_speech(http))]
    else:
        service.check(None, http)
        one = NativeSampling(max_new_tokens=1, temperature=0.0)
        choices = choices_of(items_of(GenerateRequest(input_ids=[0], sampling_params=one)), model)
    await fold(service.steps(http, choices, ()), 1)


def _add_generate(router: APIRouter, service: Service, sessions: Sessions, owners: Owners) -> None:
    model = service.model

    @router.api_route("/generate", methods=["POST", "PUT"], responses=EVENTS)
    async def generate(body: GenerateRequest, http: Request) -> Response:
        """Complete one prompt or several."""
        service.check(None, http)
        asked = None if body.session_params is None else body.session_params.continuation()
        if asked is not None and model.encoder is not None:
            raise bad_request(
                "session_params: answers of this model, an encoder-decoder, don't continue their prompts",
                "session_params",
            )
        if asked is not None:
            return await in_session(body, asked, http)
        images = await images_of(body, model)
        with in_words_of(names_in(body)):
            answer = await service.off_loop(http, lambda: _begin(body, model, http.state.request_id, images))
        owners[answer] = owner_of(http)
        return await service.respond(http, answer)

    async def in_session(body: GenerateRequest, asked: Continuation, http: Request) -> Response:
        with begun_turn(sessions, http, asked, rid_of(body, http.state.request_id)) as turn:
            weight = 1 + 8 * len(turn.before) // http.state.body_size  # its tokens as if they had been sent
            with in_words_of(names_in(body)):
                answer = await service.off_loop(
                    http, lambda: _begin(continued(body, turn, model), model, http.state.request_id), weight
                )
            reserve(sessions, turn, answer.choices)
            service.abort([each for other in turn.displaced for each in other.request_ids])
            steps = kept(sessions, turn, service.steps(http, answer.choices, answer.hints))
        owners[answer] = owner_of(http)
        return await service.send(answer, steps)


def _add_facts(router: APIRouter, model: ServedModel) -> None:
    @router.get("/model_info")
    @router.get("/get_model_info")
    async def model_info() -> Json:
        """The model, in SGLang's words."""
        return {
            "model_path": model.root,
            "served_model_name": model.name,
            "tokenizer_path": model.root,
            "is_generation": model.pooled is None,
            "preferred_sampling_params": None,
            "weight_version": model.weights.name,
        }

    @router.get("/get_server_info")
    async def server_info() -> Json:
        """The server, in SGLang's words."""
        return {
            "version": VERSION,
            "model_path": model.root,
            "served_model_name": model.name,
            "context_length": model.max_model_len,
            "max_running_requests": model.max_num_seqs,
        }


def _begin(
    body: GenerateRequest, model: ServedModel, name: str, images: Sequence[Sequence[ReadImage]] = ()
) -> NativeAnswer:
    items = items_of(body)
    return NativeAnswer(body, items, choices_of(items, model, images), model, name)


class NativeAnswer(Answer):
    """POST /generate: an object for each answer; a stream has all of an answer's text so far in each event."""

    def __init__(
        self,
        body: GenerateRequest,
        items: Sequence[Item],
        choices: list[Choice],
        model: ServedModel,
        name: str,
    ) -> None:
        self.choices = choices
        self.streams = body.stream
        self.hints = hints_in(body)
        self._is_batch = body.is_batch
        self._shows_text = body.return_text_in_logprobs
        self._model = model
        self._item_of = [item for item in items for _ in range(item.request.num_choices)]
        self._rids = [item.rid or f"{name}-{index}" for index, item in enumerate(self._item_of)]
        self._interval = max(max(item.request.stream_interval or 1 for item in items), model.stream_interval)
        places = [0] * len(choices)
        for index in range(1, len(choices)):
            same = self._item_of[index] is self._item_of[index - 1]
            places[index] = places[index - 1] + 1 if same else 0
        # of a beam search the first n answers are wanted; everything else is sent
        self._is_sent = [place < (it.request.n or 1) for place, it in zip(places, self._item_of, strict=True)]

    def requests_of(self, beginning: str) -> list[str]:
        """The engine's names of the answers whose rids begin so."""
        return [
            choice.request.request_id
            for rid, choice in zip(self._rids, self.choices, strict=True)
            if rid.startswith(beginning)
        ]

    def whole(self, deltas: list[Delta]) -> Any:
        kept = [delta for delta in deltas if self._is_sent[delta.index]]
        if self._is_batch:
            return (self._answer(delta) | {"index": index} for index, delta in enumerate(kept))
        return self._answer(kept[0])

    async def events(self, steps: Steps) -> AsyncGenerator[bytes, None]:
        """An event for each step of each answer."""
        joined: dict[int, Delta] = {}
        async with aclosing(steps if self._interval == 1 else in_batches(steps, self._interval)) as batches:
            async for deltas in batches:
                lines = []
                for delta in deltas:
                    if delta.index in joined:
                        joined[delta.index].extend(delta)
                    else:
                        joined[delta.index] = delta
                    if self._is_sent[delta.index]:
                        index = {"index": delta.index} if self._is_batch else {}
                        lines.append(event(self._answer(joined[delta.index]) | index))
                if lines:
                    yield b"".join(lines)

    def _answer(self, delta: Delta) -> Json:
        choice = self.choices[delta.index]
        item = self._item_of[delta.index]
        timeline = choice.timeline
        about: Json = {
            "id": self._rids[delta.index],
            "finish_reason": self._finish_reason(delta, choice),
            "prompt_tokens": len(choice.request.prompt_ids),
            "completion_tokens": len(delta.token_ids),
            "cached_tokens": choice.num_cached,
            "weight_version": self._model.weights.name,
            "e2e_latency": time.time() - timeline.arrival,
        }
        if choice.drafted is not None:
            about |= choice.drafted.of_sglang()
        if item.returns_logprob:
            about |= self._logprobs(delta, choice, item)
        return {"text": text_of(delta.parts), "output_ids": list(delta.token_ids), "meta_info": about}

    def _finish_reason(self, delta: Delta, choice: Choice) -> Json | None:
        match delta.finish_reason:
            case None:
                return None
            case "length":
                return {"type": "length", "length": len(delta.token_ids)}
            case "abort":
                return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
            case _:
                ended = delta.stop_reason
                if ended is None and delta.token_ids and delta.token_ids[-1] in choice.request.params.stop_token_ids:
                    ended = delta.token_ids[-1]
                return {"type": "stop", "matched": ended}

    def _logprobs(self, delta: Delta, choice: Choice, item: Item) -> Json:
        found: Json = {
            "input_token_logprobs": [],
            "output_token_logprobs": self._tokens(delta.logprobs),
        }
        ids = choice.request.token_ids
        start = item.start
        entries = (delta.prompt_logprobs or [])[start:] if start >= 0 else []
        if entries:  # as in SGLang, the first of them has none
            first = [None, ids[start], self._text(ids[start])]
            found["input_token_logprobs"] = [first, *self._tokens(entries[1:])]
        outputs = list(_there(delta.logprobs))
        inputs = list(_there(entries[1:]))
        if item.num_top:
            found["output_top_logprobs"] = self._likeliest(outputs, item)
            found["input_top_logprobs"] = [None, *self._likeliest(inputs, item)] if entries else []
        if item.named:
            found["output_token_ids_logprobs"] = self._named(outputs, item)
            found["input_token_ids_logprobs"] = [None, *self._named(inputs, item)] if entries else []
        return found

    def _tokens(self, entries: Iterable[Logprobs | None]) -> list[list[Any]]:
        return [[finite(each.logprob), each.token_id, self._text(each.token_id)] for each in _there(entries)]

    def _likeliest(self, entries: Iterable[Logprobs], item: Item) -> list[list[list[Any]]]:
        """Of each entry what stands before the tokens that the request names."""
        return [self._others(each, 0, len(each.top_ids) - len(item.named)) for each in entries]

    def _named(self, entries: Iterable[Logprobs], item: Item) -> list[list[list[Any]]]:
        return [self._others(each, len(each.top_ids) - len(item.named), len(each.top_ids)) for each in entries]

    def _others(self, entry: Logprobs, begin: int, end: int) -> list[list[Any]]:
        pairs = zip(entry.top_ids[begin:end], entry.top_logprobs[begin:end], strict=True)
        return [[finite(logprob), token_id, self._text(token_id)] for token_id, logprob in pairs]

    def _text(self, token_id: int) -> str | None:
        return self._model.tokenizer.token_text(token_id) if self._shows_text else None


def _there(entries: Iterable[Logprobs | None]) -> Iterator[Logprobs]:
    return (entry for entry in entries if entry is not None)
