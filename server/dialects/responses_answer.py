"""The answer to POST /v1/responses: the response object from its beginning to its end, and the events on the way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

from octavo.server.dialects.responses_events import Numbered, Output, encoded
from octavo.server.dialects.responses_request import ResponsesRequest
from octavo.server.errors import ApiError, interrupted
from octavo.server.generation import Choice, Steps, drafted_of, in_batches, usage_of
from octavo.server.hints import hints_in
from octavo.server.served_model import ServedModel
from octavo.server.store import StoreError
from octavo.server.streaming import Framing

logger = logging.getLogger(__name__)

Json = dict[str, Any]

NAMED_EVENTS = Framing("text/event-stream", lambda _: b"")
"""Events with names, and no [DONE]. An answer makes its own last event, of errors too."""

NOT_STORED = "response_not_stored"
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
_ENDS = {"completed": "completed", "incomplete": "incomplete", "failed": "failed", "cancelled": "incomplete"}


class ResponseAnswer:
    """One response. A whole one is made as its events are, which are then not sent.

    on_end: called once, with all events, when the last one has been made; `object` tells how far it is. It keeps the
    response: where that fails, its future raises StoreError, and the response has failed.
    log: the events so far, as they are sent, where they are kept; the place of each is its number.
    is_over: nothing will be added to the log. error: what it has failed with.
    """

    def __init__(
        self, request: ResponsesRequest, choices: list[Choice], model: ServedModel, response_id: str, *, stores: bool
    ) -> None:
        self.choices = choices
        self.streams = bool(request.stream)
        self.hints = hints_in(request) + request.own_hints
        self.id = response_id
        self.log: list[bytes] = []
        self.error: ApiError | None = None
        self.is_over = False
        self.stored: Future[None] | None = None  # what on_end has returned
        self.on_end: Callable[[ResponseAnswer, list[bytes]], Future[None] | None] = lambda *_: None
        self.status = "queued" if request.background else "in_progress"
        self._keeps_log = stores
        self._interval = max(request.stream_interval or 1, model.stream_interval)
        self._numbered = Numbered()
        self._head = _head(request, choices[0], model, response_id, stores=stores)
        self._end: Json = {"error": None, "incomplete_details": None}
        self._output = Output(
            response_id,
            self._numbered,
            namespaces=request.namespaces,
            customs=request.custom_names,
            seals="reasoning.encrypted_content" in (request.include or ()),
            tokenizer=model.tokenizer if request.wants_logprobs else None,
        )

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDS

    def object(self) -> Json:
        """The response as it is now. While it runs, items that are not complete are left out."""
        items = self._output.items
        if not self.has_ended:
            items = [item for item in items if item["status"] != "in_progress"]
        usage = _usage(self.choices) if self.has_ended else None
        drafted = drafted_of(self.choices) if self.has_ended else {}
        return {**self._head, "status": self.status, **self._end, "output": items, "usage": usage, **drafted}

    async def complete(self, steps: Steps) -> Json:
        """The whole response. Raises ApiError where it has failed."""
        async with aclosing(self.events(steps)) as events:
            async for _ in events:
                pass
        if self.error is not None:
            raise self.error
        return self.object()

    async def events(self, steps: Steps) -> AsyncGenerator[bytes, None]:
        """The events of a step in one piece. Whoever stops reading cancels the response."""
        last: list[Json] = []
        try:
            yield self._sent(self._opening())
            finish_reason = None
            steps = steps if self._interval == 1 else in_batches(steps, self._interval)
            async with aclosing(steps):
                async for deltas in steps:
                    events = self._starting()
                    for delta in deltas:
                        events += self._output.take(delta)
                        finish_reason = delta.finish_reason
                    if events:
                        yield self._sent(events)
            last = self._ending(finish_reason)
        except ApiError as error:
            last = self.fail(error)
        except Exception as error:
            logger.exception("a response broke off")
            last = self.fail(ApiError(500, f"internal error: {type(error).__name__}"))
        finally:
            is_cut = not self.has_ended
            if is_cut:
                last = self.cancel()
            pieces = self._encoded(last)
            self.stored = self.on_end(self, [*self.log, *pieces])
            if is_cut:  # nobody is there who could be told
                self._close(pieces)
        try:
            if self.stored is not None:
                await asyncio.shield(asyncio.wrap_future(self.stored))
        except StoreError as error:
            pieces[-1:] = self._encoded([self._not_stored(error, last[-1])])
        finally:
            self._close(pieces)
        yield b"".join(pieces)

    def _not_stored(self, error: StoreError, last: Json) -> Json:
        """What the last event becomes where the response could not be kept."""
        self._head["store"] = False
        self.error = not_stored(error)
        self.status = "failed"
        self._end = {"error": {"code": "server_error", "message": self.error.message}, "incomplete_details": None}
        return {"type": "response.failed", "sequence_number": last["sequence_number"], "response": self.object()}

    def _close(self, pieces: list[bytes]) -> None:
        if self._keeps_log:
            self.log += pieces
        self.is_over = True

    def fail(self, error: ApiError) -> list[Json]:
        """End it with an error; returns the last events."""
        self.error = error
        code = _ERROR_CODES.get(error.status, "server_error")
        self._end["error"] = {"code": code, "message": error.message}
        return self._ended("failed")

    def cancel(self) -> list[Json]:
        """End it where it is; returns the last events."""
        return self._ended("cancelled")

    def _opening(self) -> list[Json]:
        return [self._state("created"), self._state("queued" if self.status == "queued" else "in_progress")]

    def _starting(self) -> list[Json]:
        """What the first step of a response that was queued begins with."""
        if self.status != "queued":
            return []
        self.status = "in_progress"
        return [self._state("in_progress")]

    def _ending(self, finish_reason: str | None) -> list[Json]:
        """The last events. An answer that repeats itself was cut as one that is too long."""
        if finish_reason == "abort":
            return self.fail(interrupted())
        if finish_reason not in ("length", "repetition"):
            return self._ended("completed")
        self._end["incomplete_details"] = {"reason": "max_output_tokens"}
        return self._ended("incomplete")

    def _ended(self, status: str) -> list[Json]:
        has_output = status in ("completed", "incomplete") or bool(self._output.items)
        events = list(self._output.end(is_cut=status != "completed")) if has_output else []
        self.status = status
        self._end["completed_at"] = int(time.time()) if status == "completed" else None
        return [*events, self._state(_ENDS[status])]

    def _state(self, kind: str) -> Json:
        return self._numbered.event(kind, response=self.object())

    def _sent(self, events: list[Json]) -> bytes:
        """These events as they are sent, and kept."""
        pieces = self._encoded(events)
        if self._keeps_log:
            self.log += pieces
        return b"".join(pieces)

    def _encoded(self, events: list[Json]) -> list[bytes]:
        """Each as it is sent; none where nobody will ever see them."""
        return encoded(events) if self._keeps_log or self.streams else []


def not_stored(error: StoreError) -> ApiError:
    """For a response that would be kept. Asking again would make it again, in vain."""
    why = f"the response could not be stored: {error}; with store: false it would not have to be"
    return ApiError(500, why, code=NOT_STORED, headers={"x-should-retry": "false"})


def _usage(choices: list[Choice]) -> Json:
    """OpenAI's shape of it here. What is written to the prefix cache is what was not found there."""
    usage = usage_of(choices)
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _head(request: ResponsesRequest, choice: Choice, model: ServedModel, response_id: str, *, stores: bool) -> Json:
    """The fields that stay as they are: what was asked for, and what holds where nothing was."""
    params = choice.request.params
    text: Json = {"format": {"type": "text"}, "verbosity": "medium"}
    if request.text is not None:
        text |= request.text.model_dump(exclude_none=True, by_alias=True)
    reasoning: Json = {"effort": None, "summary": None}
    if request.reasoning is not None:
        reasoning |= request.reasoning.model_dump(exclude_none=True)
    tool_choice: Any = request.tool_choice or "auto"
    if not isinstance(tool_choice, str):
        tool_choice = tool_choice.model_dump(exclude_none=True)
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": request.model or model.name,
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "conversation": None,
        "background": bool(request.background),
        "store": stores,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "tools": [tool.model_dump(exclude_unset=True) for tool in request.tools or ()],
        "tool_choice": tool_choice,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_logprobs": request.top_logprobs or 0,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "text": text,
        "reasoning": reasoning,
        "truncation": request.truncation or "disabled",
        "metadata": request.metadata or {},
        "service_tier": "default",
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }
