"""What OpenAI's two dialects have in common: the frame of an answer, its events, and vLLM's fields in both.

One delta is rendered in the same way whether it is a step's or, all of a choice's deltas joined, the whole answer.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request

from octavo.server.dialects.fields import GenerationRequest
from octavo.server.dialects.logprobs import prompt_logprobs
from octavo.server.encoding import encode_in_turns
from octavo.server.generation import Choice, Delta, Steps, drafted_of, in_batches, usage_of
from octavo.server.hints import hints_in
from octavo.server.served_model import ServedModel
from octavo.server.service import Answer
from octavo.server.streaming import event

Json = dict[str, Any]


class OpenAIAnswer(Answer):
    """An answer that is sent as chunks around choices."""

    def __init__(self, request: GenerationRequest, choices: list[Choice], model: ServedModel) -> None:
        self.request = request
        self._stream_interval = model.stream_interval
        self.choices = choices
        self.streams = bool(request.stream)
        self.hints = hints_in(request)

    @abstractmethod
    def chunks(self, delta: Delta) -> list[Json]:
        """The chunks that a delta is sent as, whole; none where there is nothing to say yet."""

    @abstractmethod
    def frame(self, choices: list[Json]) -> Json:
        """A chunk around these choices."""

    async def events(self, steps: Steps) -> AsyncGenerator[bytes, None]:
        """The chunks of a step in one piece; at the end the usage, if it was asked for."""
        options = self.request.stream_options
        counts_tokens = options is not None and bool(options.include_usage)
        counts_always = counts_tokens and options is not None and bool(options.continuous_usage_stats)
        interval = max(self.request.stream_interval or 1, self._stream_interval)
        steps = steps if interval == 1 else in_batches(steps, interval)
        async with aclosing(steps):
            async for deltas in steps:
                frames = [chunk for delta in deltas for chunk in self.chunks(delta)]
                if counts_always:
                    counted = {"usage": usage_of(self.choices).as_json()}
                    frames = [frame | counted for frame in frames]
                if any(delta.prompt_logprobs is not None for delta in deltas):  # echoed with the prompt: perhaps long
                    yield b"".join([await _event_in_turns(frame) for frame in frames])
                elif frames:
                    yield b"".join(map(event, frames))
        if counts_tokens:
            yield event(self.frame([]) | {"usage": usage_of(self.choices).as_json()} | drafted_of(self.choices))


async def _event_in_turns(frame: Json) -> bytes:
    """`event` of a frame whose choices may be long."""
    choices = (choice for choice in frame["choices"])
    return b"".join([b"data: ", *await encode_in_turns(frame | {"choices": choices}), b"\n\n"])


def request_id_of(http: Request, body: GenerationRequest) -> str:
    """What a request is called: by its X-Request-Id, else by its body, else by the server."""
    own: str = http.state.request_id
    name = own if http.headers.get("x-request-id") == own else body.request_id or body.rid or own
    http.state.request_name = name
    return name


def names_ids(request: GenerationRequest, model: ServedModel) -> bool:
    """Whether log-probabilities name tokens by their ids."""
    asked = request.return_tokens_as_token_ids
    return model.tokens_as_token_ids if asked is None else asked


def head(request_id: str, kind: str, request: GenerationRequest, model: ServedModel) -> Json:
    """The fields that stand in front of an answer's choices."""
    return {
        "id": request_id,
        "object": kind,
        "created": int(time.time()),
        "model": request.model or model.name,
    }


def about_prompt(request: GenerationRequest, delta: Delta, prompt_ids: list[int], model: ServedModel) -> Json:
    """vLLM's own fields of a prompt, for those who asked; they come with the first delta."""
    found: Json = {}
    if request.return_token_ids and delta.is_first:
        found["prompt_token_ids"] = prompt_ids
    if request.return_prompt_text and delta.is_first:
        found["prompt_text"] = model.tokenizer.decode(prompt_ids)
    if request.prompt_logprobs is not None and delta.prompt_logprobs is not None:
        found["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, model.tokenizer)
    return found
