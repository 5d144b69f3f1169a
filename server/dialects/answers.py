"""The responses of /v1/completions and /v1/chat/completions: JSON out of deltas, whole or chunk by chunk.

One delta is rendered in the same way whether it is a step's or, all of a choice's deltas joined, the whole answer.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import msgspec

from octavo.runtime.messages import AddRequest
from octavo.server.dialects.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from octavo.server.dialects.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from octavo.server.errors import bad_request
from octavo.server.generation import Choice, Delta, make_choice, usage_of
from octavo.server.prompts import Prompt, chat_max_tokens, sampling_params
from octavo.server.served_model import ServedModel
from octavo.server.streaming import event
from octavo.text.detokenizer import IncrementalDecoder

MAX_WHOLE = 1 << 22  # tokens and log-probabilities of an answer that isn't streamed; as objects they take 300 MB

_unique = itertools.count()

Json = dict[str, Any]
Steps = AsyncGenerator[list[Delta], None]


class Answer(Protocol):
    """One HTTP request's answer under way."""

    @property
    def request(self) -> GenerationRequest: ...

    @property
    def choices(self) -> list[Choice]: ...

    def whole(self, deltas: list[Delta]) -> Json:
        """The response, of all choices' joined deltas in order."""
        ...

    def chunks(self, delta: Delta) -> list[Json]:
        """The chunks that a delta is sent as; none where there is nothing to say yet."""
        ...

    def frame(self, choices: list[Json]) -> Json:
        """A chunk around these choices."""
        ...


def make_choices(
    prompts: Sequence[Prompt], request: GenerationRequest, model: ServedModel, max_tokens: int | None
) -> list[Choice]:
    """n choices for each prompt, side by side. A seed is the first one's; the others count up from it."""
    arrival = time.time()
    rooms = [model.max_model_len - len(prompt.token_ids) for prompt in prompts]
    params = sampling_params(request, model, room=min(rooms), max_tokens=max_tokens)
    choices: list[Choice] = []
    for prompt, room in zip(prompts, rooms, strict=True):
        own = params if max_tokens is not None else msgspec.structs.replace(params, max_tokens=room)
        first, *others = (f"request-{next(_unique)}" for _ in range(request.num_choices))
        sent = AddRequest(first, prompt.token_ids, own, arrival, request.cache_salt or "", others)
        wanted = 0 if max_tokens == 0 else own.max_tokens
        for answer in sent.answers():
            choices.append(make_choice(len(choices), answer, sent, request, model, num_wanted=wanted))
    return choices


class CompletionAnswer:
    """POST /v1/completions. With echo, the prompt stands before the answer, its log-probabilities before the answer's.

    The echoed text is the tokens', special ones written out, without those that the tokenizer put before the client's
    own text (a BOS token).
    """

    def __init__(self, request: CompletionRequest, prompts: list[Prompt], model: ServedModel) -> None:
        self.request = request
        self.choices = make_choices(prompts, request, model, request.max_tokens)
        self._model = model
        self._head = _head("cmpl-", "text_completion", request, model)
        self._echoes = [_echo(prompt, model) for prompt in prompts] if request.echo else []

    def whole(self, deltas: list[Delta]) -> Json:
        return self.frame([self._choice(delta) for delta in deltas]) | {"usage": usage_of(self.choices).as_json()}

    def chunks(self, delta: Delta) -> list[Json]:
        rendered = self._choice(delta)
        silent = not rendered["text"] and rendered["logprobs"] is None and delta.finish_reason is None
        return [] if silent and not self.request.return_token_ids else [rendered]

    def frame(self, choices: list[Json]) -> Json:
        return {**self._head, "choices": choices}

    def _choice(self, delta: Delta) -> Json:
        request = self.request
        tokenizer = self._model.tokenizer
        prompt_ids = self.choices[delta.index].request.token_ids
        text = delta.text
        ids = delta.token_ids
        offsets = delta.offsets
        entries: list[Any] = delta.logprobs
        if request.echo:
            echo, starts = self._echoes[delta.index // request.num_choices]
            offsets = [offset + len(echo) for offset in offsets]
            if delta.is_first:
                text = echo + text
                ids = prompt_ids + ids
                offsets = starts + offsets
                entries = (delta.prompt_logprobs or []) + entries
        content: Json = {
            "index": delta.index,
            "text": text,
            "logprobs": None
            if request.logprobs is None
            else completion_logprobs(_cut(entries, request.logprobs), ids, offsets, tokenizer),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return content | _extras(request, delta, prompt_ids, self._model)


class ChatAnswer:
    """POST /v1/chat/completions."""

    def __init__(self, request: ChatCompletionRequest, prompt: Prompt, model: ServedModel) -> None:
        self.request = request
        self.choices = make_choices([prompt], request, model, chat_max_tokens(request))
        self._model = model
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head = _head("chatcmpl-", kind, request, model)
        self._role = "assistant"
        self._echo = _last_words(request) if request.echo else ""

    def whole(self, deltas: list[Delta]) -> Json:
        choices = []
        for delta in deltas:
            message = {"role": self._role, "content": self._echo + delta.text, "refusal": None}
            choices.append({"index": delta.index, "message": message, **self._rest(delta)})
        return self.frame(choices) | {"usage": usage_of(self.choices).as_json()}

    def chunks(self, delta: Delta) -> list[Json]:
        chunks: list[Json] = []
        if delta.is_first:
            start = {"role": self._role, "content": self._echo}
            chunks.append({"index": delta.index, "delta": start, "logprobs": None, "finish_reason": None})
        if delta.text or delta.logprobs or delta.finish_reason is not None or self.request.return_token_ids:
            content = {"content": delta.text} if delta.text else {}
            chunks.append({"index": delta.index, "delta": content, **self._rest(delta)})
        return chunks

    def frame(self, choices: list[Json]) -> Json:
        return {**self._head, "choices": choices}

    def _rest(self, delta: Delta) -> Json:
        logprobs = None
        if self.request.logprobs:
            logprobs = {"content": chat_logprobs(delta.logprobs, self._model.tokenizer)}
        content: Json = {
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        prompt_ids = self.choices[delta.index].request.token_ids
        return content | _extras(self.request, delta, prompt_ids, self._model)


async def fold(answer: Answer, steps: Steps) -> list[Delta]:
    """All deltas of each choice joined, in the order of the choices, when all steps are there."""
    whole: dict[int, Delta] = {}
    size = 0
    async with aclosing(steps):
        async for deltas in steps:
            size += sum(delta.size for delta in deltas)
            if size > MAX_WHOLE:
                raise bad_request(
                    f"the answer has more than {MAX_WHOLE} tokens and logprobs; ask for it as a stream", "stream"
                )
            for delta in deltas:
                if delta.index in whole:
                    whole[delta.index].extend(delta)
                else:
                    whole[delta.index] = delta
    return [whole[index] for index in range(len(answer.choices))]


async def events(answer: Answer, steps: Steps) -> AsyncGenerator[bytes, None]:
    """Server-sent events: the chunks of a step in one piece; at the end the usage, if it was asked for."""
    options = answer.request.stream_options
    usage_always = options is not None and options.continuous_usage_stats
    async with aclosing(steps):
        async for deltas in steps:
            frames = [answer.frame([choice]) for delta in deltas for choice in answer.chunks(delta)]
            if usage_always:
                counted = {"usage": usage_of(answer.choices).as_json()}
                frames = [frame | counted for frame in frames]
            if frames:
                yield b"".join(map(event, frames))
    if options is not None and options.include_usage:
        yield event(answer.frame([]) | {"usage": usage_of(answer.choices).as_json()})


def _head(prefix: str, kind: str, request: GenerationRequest, model: ServedModel) -> Json:
    return {
        "id": prefix + (request.request_id or uuid.uuid4().hex),
        "object": kind,
        "created": int(time.time()),
        "model": request.model or model.name,
    }


def _echo(prompt: Prompt, model: ServedModel) -> tuple[str, list[int]]:
    """The prompt's text, and where each of its tokens begins in it."""
    decoder = IncrementalDecoder(model.tokenizer, skip_special_tokens=False)
    pieces = [decoder.push((token_id,)) for token_id in prompt.token_ids]
    starts = [0, *itertools.accumulate(map(len, pieces))][:-1]
    text = "".join(pieces)
    surplus = len(text) - len(prompt.text) if prompt.text is not None and text.endswith(prompt.text) else 0
    return text[surplus:], [max(0, start - surplus) for start in starts]


def _cut(entries: Sequence[Any], count: int) -> list[Any]:
    """Entries with `count` of the most likely tokens: prompt_logprobs may have asked for more."""
    return [
        entry
        if entry is None or len(entry.top_ids) <= count
        else msgspec.structs.replace(entry, top_ids=entry.top_ids[:count], top_logprobs=entry.top_logprobs[:count])
        for entry in entries
    ]


def _extras(request: GenerationRequest, delta: Delta, prompt_ids: list[int], model: ServedModel) -> Json:
    """vLLM's own fields, for those who asked."""
    extras: Json = {}
    if request.return_token_ids:
        extras["token_ids"] = delta.token_ids
        if delta.is_first:
            extras["prompt_token_ids"] = prompt_ids
    if request.prompt_logprobs is not None and delta.prompt_logprobs is not None:
        extras["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, model.tokenizer)
    return extras


def _last_words(request: ChatCompletionRequest) -> str:
    """What echo puts before the answer: the last message, if it is an assistant's (vLLM's meaning of it)."""
    last = request.messages[-1]
    if last.role != "assistant" or last.content is None:
        return ""
    return last.content if isinstance(last.content, str) else "\n".join(part.text for part in last.content)
