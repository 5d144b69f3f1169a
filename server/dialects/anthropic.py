"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect, which Claude Code speaks.

A whole answer's blocks are the parts that the model has said; a stream's are the same parts as they come. Text behind a
call is a block of its own, and an answer that says nothing is one empty text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import pydantic_core
from fastapi import APIRouter, Request
from fastapi.responses import Response

from octavo.server.dialects.anthropic_request import (
    OPENAI_NAMES,
    CountTokensRequest,
    MessagesRequest,
    call_id_of,
    chat_of,
)
from octavo.server.dialects.chat_request import ChatCompletionRequest, begin, in_words_of
from octavo.server.dialects.conversation import chat_token_ids, images_of, render_request, rendered
from octavo.server.dialects.system_turns import SystemProbe
from octavo.server.dialects.thinking import takes_effort
from octavo.server.dialects.tools import shown_tools
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import ANTHROPIC_RESPONSES, EVENTS, interrupted
from octavo.server.generation import Choice, Delta, Steps
from octavo.server.hints import hints_in
from octavo.server.message.parts import Part
from octavo.server.served_model import ServedModel
from octavo.server.service import Answer, Service
from octavo.server.streaming import Framing
from octavo.server.strict_json import StrictRoute

SIGNATURE = "octavo"
"""Of a thinking block: nothing here is signed, and clients take an empty one for a block that is not whole."""

Json = dict[str, Any]


def event(content: Json) -> bytes:
    """One server-sent event, under its type's name."""
    name: str = content["type"]
    return b"event: " + name.encode() + b"\ndata: " + encode_json(content) + b"\n\n"


FRAMING = Framing("text/event-stream", lambda error: event(error.body("/v1/messages")))


def routes(service: Service) -> APIRouter:
    """/v1/messages, /v1/messages/count_tokens."""
    router = APIRouter(route_class=StrictRoute, responses=ANTHROPIC_RESPONSES)
    model = service.model
    probe = SystemProbe(model)

    async def chat(body: CountTokensRequest, http: Request) -> ChatCompletionRequest:
        takes = await probe.turns(has_tools=bool(body.tools))
        return await service.off_loop(http, lambda: chat_of(body, takes, model))

    @router.post("/v1/messages", responses=EVENTS)
    async def messages(body: MessagesRequest, http: Request) -> Response:
        """Answer a conversation."""
        service.check(body.model, http)
        asked = await chat(body, http)
        with in_words_of(OPENAI_NAMES):
            choices = await begin(asked, http, service, clamps=True)
        hints = _hints(body, http, model)
        return await service.respond(http, MessagesAnswer(body, choices, model, hints, http.state.request_id))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest, http: Request) -> Response:
        """How many tokens the prompt of a conversation has."""
        service.check_name(body.model)
        asked = await chat(body, http)
        with in_words_of(OPENAI_NAMES):
            images = await images_of(asked, model)
        job = await service.off_loop(http, lambda: render_request(asked, model, None, shown_tools(asked, model)))
        text = await rendered(job, model)
        ids = await service.off_loop(http, lambda: chat_token_ids(text, asked, model, images, must_fit=False))
        return JsonResponse(encode_json({"input_tokens": len(ids)}))

    return router


def _hints(body: MessagesRequest, http: Request, model: ServedModel) -> list[str]:
    """The request's fields that change nothing, and the betas that its header names: what they bring is in fields."""
    hints = hints_in(body)
    if "anthropic-beta" in http.headers:
        hints.append("anthropic-beta")
    if body.output_config is not None and body.output_config.effort is not None and not takes_effort(model):
        hints.append("output_config.effort")
    return hints


class MessagesAnswer(Answer):
    """POST /v1/messages."""

    framing = FRAMING

    def __init__(
        self, request: MessagesRequest, choices: list[Choice], model: ServedModel, hints: list[str], name: str
    ) -> None:
        self.choices = choices
        self.streams = bool(request.stream)
        self.hints = hints
        self._limit = request.max_tokens
        self._hides_thoughts = request.thinking is not None and request.thinking.display == "omitted"
        self._head = {
            "id": f"msg_{name}",
            "type": "message",
            "role": "assistant",
            "model": request.model or model.name,
        }

    def whole(self, deltas: list[Delta]) -> Json:
        [delta] = deltas
        return {
            **self._head,
            "content": content_of(delta.parts, hides_thoughts=self._hides_thoughts),
            **self._ending(delta, delta.parts),
            "usage": self._usage(),
        }

    async def events(self, steps: Steps) -> AsyncGenerator[bytes, None]:
        """A step's events in one piece."""
        blocks = _OpenBlocks(hides_thoughts=self._hides_thoughts)
        has_begun = False
        final: Delta | None = None
        async with aclosing(steps):
            async for deltas in steps:
                pieces: list[bytes] = []
                if deltas and not has_begun:
                    has_begun = True
                    pieces += self._opening()
                for delta in deltas:
                    pieces += [event(said) for part in delta.parts for said in blocks.say(part)]
                    if delta.finish_reason is not None:
                        final = delta
                if pieces:
                    yield b"".join(pieces)
        ending = {} if final is None else self._ending(final, blocks.said)
        last = [*blocks.end(), {"type": "message_delta", "delta": ending, "usage": self._usage()}]
        yield b"".join(map(event, [*last, {"type": "message_stop"}]))

    def _opening(self) -> list[bytes]:
        """With the first token, since only then it is known how much of the prompt was cached."""
        message: Json = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage() | {"output_tokens": 0},
        }
        return [event({"type": "message_start", "message": message}), event({"type": "ping"})]

    def _ending(self, delta: Delta, parts: Sequence[Part]) -> Json:
        """Why the answer has ended. parts: at least its last call, and whether that is complete.

        One that repeats itself was cut as one that is too long. Raises ApiError for one that was ended from outside.
        """
        if delta.finish_reason == "abort":
            raise interrupted()
        if delta.finish_reason in ("length", "repetition"):
            is_clamped = delta.finish_reason == "length" and self.choices[0].request.params.max_tokens < self._limit
            reason = "model_context_window_exceeded" if is_clamped else "max_tokens"
            return {"stop_reason": reason, "stop_sequence": None}
        if isinstance(delta.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": delta.stop_reason}
        has_calls = any(part.kind == "call_end" for part in parts)
        return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}

    def _usage(self) -> Json:
        """The counts so far. Tokens that were cached are not among input_tokens."""
        [choice] = self.choices
        thought: Json = {}
        if choice.parser.num_reasoning is not None:
            thought["output_tokens_details"] = {"thinking_tokens": choice.parser.num_reasoning}
        return {
            "input_tokens": len(choice.request.prompt_ids) - choice.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": choice.num_cached,
            "output_tokens": choice.num_tokens,
            **thought,
        }


def content_of(parts: Sequence[Part], *, hides_thoughts: bool) -> list[Json]:
    """The blocks of a whole answer."""
    blocks: list[Json] = []
    arguments = ""
    for part in parts:
        match part.kind:
            case "reasoning":
                shown = "" if hides_thoughts else part.text
                blocks.append({"type": "thinking", "thinking": shown, "signature": SIGNATURE})
            case "text":
                blocks.append({"type": "text", "text": part.text.lstrip() if blocks else part.text})
            case "call":
                arguments = ""
                blocks.append({"type": "tool_use", "id": call_id_of(part.call_id), "name": part.text, "input": {}})
            case "arguments":
                arguments += part.text
                blocks[-1]["input"] = _input(arguments)
            case _:
                pass
    return blocks or [{"type": "text", "text": ""}]


def _input(arguments: str) -> Any:
    """A call's arguments as an object; of a call that was cut what there is, as Anthropic's client reads a stream."""
    try:
        return pydantic_core.from_json(arguments, allow_partial=True)
    except ValueError:
        return {}


class _OpenBlocks:
    """The blocks of a stream: which one is open, and the events that each part makes.

    said: parts that tell how the answer may end.
    """

    def __init__(self, *, hides_thoughts: bool) -> None:
        self.said: list[Part] = []
        self._hides_thoughts = hides_thoughts
        self._index = -1
        self._open = ""

    def say(self, part: Part) -> Iterator[Json]:
        """The events of one part."""
        match part.kind:
            case "reasoning":
                if self._open != part.kind:
                    yield from self._start(part.kind, {"type": "thinking", "thinking": "", "signature": ""})
                if not self._hides_thoughts:
                    yield self._delta({"type": "thinking_delta", "thinking": part.text})
            case "text":
                text = part.text
                if self._open != part.kind:
                    text = text.lstrip() if self._index >= 0 else text  # blocks are apart without whitespace
                    yield from self._start(part.kind, {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case "call":
                block = {"type": "tool_use", "id": call_id_of(part.call_id), "name": part.text, "input": {}}
                yield from self._start(part.kind, block)
            case "arguments":
                yield self._delta({"type": "input_json_delta", "partial_json": part.text})
            case _:
                self.said = [part]
                yield from self._stop()

    def end(self) -> Iterator[Json]:
        """The events behind the last part."""
        if self._index < 0:
            yield from self._start("text", {"type": "text", "text": ""})
        yield from self._stop()

    def _start(self, kind: str, block: Json) -> Iterator[Json]:
        yield from self._stop()
        self._index += 1
        self._open = kind
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop(self) -> Iterator[Json]:
        if self._open == "reasoning":
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        if self._open:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = ""
