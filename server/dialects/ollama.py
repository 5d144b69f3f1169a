"""Ollama's /api: chat and generate. A stream is lines of JSON, the last of which says how long what has taken.

A call is sent when it is complete, since its arguments are an object here; of one that was cut its text is sent.
"""

from __future__ import annotations

import json
import re
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from octavo.server.dialects import ollama_models
from octavo.server.dialects.chat_request import begin, in_words_of
from octavo.server.dialects.completions import CompletionRequest, prompts_of, wanted_of
from octavo.server.dialects.logprobs import chat_logprobs
from octavo.server.dialects.ollama_request import (
    OPENAI_NAMES,
    ChatRequest,
    GenerateRequest,
    GenerationFields,
    chat_of,
    shared_fields,
)
from octavo.server.dialects.system_turns import SystemProbe
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import OLLAMA_RESPONSES, also_as, bad_request, explain, interrupted
from octavo.server.fim import fim_of
from octavo.server.generation import Choice, Delta, Steps, make_choices
from octavo.server.hints import hints_in
from octavo.server.message.parts import Part
from octavo.server.served_model import ServedModel
from octavo.server.service import Answer, Service
from octavo.server.streaming import Framing

Json = dict[str, Any]


def line(content: Json) -> bytes:
    """One line of a stream."""
    return encode_json(content) + b"\n"


LINES = also_as("application/x-ndjson")
FRAMING = Framing("application/x-ndjson", lambda error: line(error.body("/api/")))


def routes(service: Service) -> APIRouter:
    """/api/chat, /api/generate, and the routes about models."""
    router = APIRouter(route_class=ollama_models.OllamaRoute, responses=OLLAMA_RESPONSES)
    model = service.model
    probe = SystemProbe(model)

    async def answered(body: ChatRequest | GenerateRequest, http: Request, kind: type[OllamaAnswer]) -> Response:
        service.check(ollama_models.plain_name(body.model, model), http)
        if isinstance(body, GenerateRequest) and (body.raw or body.suffix or _is_for_encoder(body, model)):
            weight = 16 if body.format else 1  # a schema is rewritten and compiled
            with in_words_of(OPENAI_NAMES):
                choices = await service.off_loop(http, lambda: _raw_choices(body, model), weight)
        else:
            takes = await probe.turns(has_tools=isinstance(body, ChatRequest) and bool(body.tools))
            chat = await service.off_loop(http, lambda: chat_of(body, takes, model))
            chat.model = ollama_models.plain_name(body.model, model)
            with in_words_of(OPENAI_NAMES):
                choices = await begin(chat, http, service, clamps=True)
        return await service.respond(http, kind(body, choices, model))

    @router.post("/api/chat", responses=LINES)
    async def chat(body: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        if not body.messages:
            return _loaded(body, http, service, {"message": {"role": "assistant", "content": ""}})
        return await answered(body, http, ChatAnswer)

    @router.post("/api/generate", responses=LINES)
    async def generate(body: GenerateRequest, http: Request) -> Response:
        """Answer one prompt, through the chat template or, with raw, as it is."""
        if not body.prompt and not body.suffix and not body.images:
            return _loaded(body, http, service, {"response": ""})
        return await answered(body, http, GenerateAnswer)

    router.include_router(ollama_models.routes(service))
    return router


def _loaded(body: GenerationFields, http: Request, service: Service, empty: Json) -> Response:
    """To a request that only wants the model loaded: it is. One that wants it unloaded is told so; it stays."""
    service.check(ollama_models.plain_name(body.model, service.model), http)
    reason = "unload" if _is_zero(body.keep_alive) else "load"
    return JsonResponse(encode_json({**_head(body.model), **empty, "done_reason": reason, "done": True}))


def _is_for_encoder(body: GenerateRequest, model: ServedModel) -> bool:
    """Whether a prompt is what an encoder reads, as it is: few of those models have a chat template."""
    needs_template = bool(body.system or body.think is not None or body.images)
    return model.encoder is not None and not model.renderer.template.templates and not needs_template


def _is_zero(duration: object) -> bool:
    """Of keep_alive: a number of seconds, or a text as Go writes durations."""
    if isinstance(duration, str):
        return re.fullmatch(r"[+-]?0+(\.0*)?(h|m|s|ms|us|µs|ns)?", duration) is not None
    return duration == 0 and not isinstance(duration, bool)


def _raw_choices(body: GenerateRequest, model: ServedModel) -> list[Choice]:
    """The answer to a prompt as it is, up to what the context leaves. Raises ApiError."""
    named = ollama_models.plain_name(body.model, model)
    fields = shared_fields(body) | {"model": named, "prompt": body.prompt, "suffix": body.suffix or None}
    limit = fields.pop("max_tokens", None)
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    try:
        request = CompletionRequest.model_validate({**fields, "max_tokens": 1})
    except ValidationError as error:
        raise bad_request(*explain(error.errors(include_url=False), fields)) from None
    [prompt] = prompts_of(request, model)
    room = prompt.room(model)
    fim = fim_of(model) if request.suffix else None
    wanted = replace(wanted_of(request, fim), max_tokens=min(room, limit or room))
    return make_choices([prompt], request, wanted, model)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def _head(name: str) -> Json:
    return {"model": name, "created_at": _now()}


class OllamaAnswer(Answer):
    """What chat and generate have in common."""

    framing = FRAMING

    def __init__(self, request: GenerationFields, choices: list[Choice], model: ServedModel) -> None:
        self.choices = choices
        self.streams = request.stream is not False
        self.hints = hints_in(request)
        if request.options is not None:
            self.hints += [f"options.{name}" for name in hints_in(request.options)]
        self._request = request
        self._model = model

    @abstractmethod
    def said(self, text: str, thoughts: str, calls: list[Json]) -> Json:
        """The fields that say this much of the answer."""

    def whole(self, deltas: list[Delta]) -> Json:
        [delta] = deltas
        fold = _Fold()
        fields = self.said(*fold.take(delta.parts, is_last=True))
        return {**_head(self._request.model), **fields, **self._logprobs(delta), **self._ending(delta)}

    async def events(self, steps: Steps) -> AsyncGenerator[bytes, None]:
        """A line for each step that said something, and a last one."""
        fold = _Fold()
        final: Delta | None = None
        async with aclosing(steps):
            async for deltas in steps:
                lines = [said for delta in deltas for said in self._lines(delta, fold)]
                if lines:
                    yield b"".join(lines)
                final = deltas[-1] if deltas else final
        if final is not None:
            yield line({**_head(self._request.model), **self.said("", "", []), **self._ending(final)})

    def _lines(self, delta: Delta, fold: _Fold) -> Iterator[bytes]:
        is_last = delta.finish_reason is not None
        text, thoughts, calls = fold.take(delta.parts, is_last=is_last)
        logprobs = self._logprobs(delta)
        if text or thoughts or calls or logprobs:
            yield line({**_head(self._request.model), **self.said(text, thoughts, calls), **logprobs, "done": False})

    def _logprobs(self, delta: Delta) -> Json:
        if not self._request.logprobs or not delta.logprobs:
            return {}
        return {"logprobs": chat_logprobs(delta.logprobs, self._model.tokenizer)}

    def _ending(self, delta: Delta) -> Json:
        """Why the answer has ended, and what it took, in nanoseconds. The model was loaded when the server started.

        One that repeats itself was cut as one that is too long. Raises ApiError for one that was ended from outside.
        """
        if delta.finish_reason == "abort":
            raise interrupted()
        [choice] = self.choices
        times = choice.timeline
        return {
            "done": True,
            "done_reason": "length" if delta.finish_reason in ("length", "repetition") else "stop",
            "total_duration": _nanoseconds(times.arrival, time.time()),
            "load_duration": 0,
            "prompt_eval_count": len(choice.request.prompt_ids),
            "prompt_eval_duration": _nanoseconds(times.scheduled or times.arrival, times.first),
            "eval_count": choice.num_tokens,
            "eval_duration": _nanoseconds(times.first, times.last),
        }


def _nanoseconds(begin: float, end: float) -> int:
    return max(0, round((end - begin) * 1e9))


class ChatAnswer(OllamaAnswer):
    """POST /api/chat."""

    def said(self, text: str, thoughts: str, calls: list[Json]) -> Json:
        message: Json = {"role": "assistant", "content": text}
        if thoughts:
            message["thinking"] = thoughts
        if calls:
            message["tool_calls"] = calls
        return {"message": message}


class GenerateAnswer(OllamaAnswer):
    """POST /api/generate, which has no tools."""

    def said(self, text: str, thoughts: str, calls: list[Json]) -> Json:
        del calls
        return {"response": text, "thinking": thoughts} if thoughts else {"response": text}


class _Fold:
    """Parts to text, thoughts and complete calls."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._call: Part | None = None
        self._arguments = ""

    def take(self, parts: Sequence[Part], *, is_last: bool) -> tuple[str, str, list[Json]]:
        """What these parts complete. is_last: no parts follow, so that an open call was cut."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[Json] = []
        for part in parts:
            match part.kind:
                case "text":
                    texts.append(part.text)
                case "reasoning":
                    thoughts.append(part.text)
                case "call":
                    texts.append(self._cut())
                    self._call = part
                case "arguments":
                    self._arguments += part.text
                case "call_end":
                    calls += self._complete()
                    texts.append(self._cut())
        if is_last:
            texts.append(self._cut())
        return "".join(texts), "".join(thoughts), calls

    def _complete(self) -> list[Json]:
        call = self._call
        if call is None:
            return []
        try:
            arguments = msgspec.json.decode(self._arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            return []  # it is sent as text
        function = {"index": self._num_calls, "name": call.text, "arguments": arguments}
        self._num_calls += 1
        self._call = None
        self._arguments = ""
        return [{"id": call.call_id, "function": function}]

    def _cut(self) -> str:
        """What there is of a call that has no end, as text."""
        if self._call is None:
            return ""
        text = f'{{"name": {json.dumps(self._call.text)}, "arguments": {self._arguments}'
        self._call = None
        self._arguments = ""
        return text
