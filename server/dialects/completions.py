"""POST /v1/completions: OpenAI's older dialect, text in and text out, with vLLM's fields."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Discriminator, Field, Tag, model_validator

from octavo.server.dialects.fields import (
    ALL_LOGPROBS,
    MAX_TOKENS_SENT,
    Count,
    Flag,
    GenerationRequest,
    LogprobCount,
    Text,
    TextOption,
    TokenId,
)
from octavo.server.dialects.logprobs import completion_logprobs, names_of
from octavo.server.dialects.openai import Json, OpenAIAnswer, about_prompt, head, names_ids, request_id_of
from octavo.server.dialects.thinking import NoReasoning
from octavo.server.errors import EVENTS, RESPONSES, bad_request, field_error
from octavo.server.fim import Fim, fim_of, needed_fim, suffix_ids
from octavo.server.generation import Delta, drafted_of, make_choices, usage_of
from octavo.server.message.parts import text_of
from octavo.server.prompts import Prompt, Wanted, check_total, decoder_begin, encode, fitted
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute
from octavo.text.detokenizer import IncrementalDecoder

MAX_ANSWERS = 4096  # of one HTTP request: prompts x n

TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS_SENT, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]


def _kind_of_prompt(value: object) -> str:
    """The first element decides, so that an error message is about the kind of prompt that was meant."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else None
    return "<texts>" if isinstance(first, str) else "<token lists>" if isinstance(first, list) else "<tokens>"


class CompletionRequest(NoReasoning, GenerationRequest):
    """POST /v1/completions. A list of prompts is answered with n choices for each.

    decoder_prompt: of an encoder-decoder, what its decoder begins all answers with.
    """

    prompt: Annotated[
        TextOption
        | Annotated[TokenIds, Tag("<tokens>")]
        | Annotated[Texts, Tag("<texts>")]
        | Annotated[TokenLists, Tag("<token lists>")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: Count | None = None
    logprobs: LogprobCount | None = None
    echo: Flag | None = None
    add_special_tokens: Flag = True
    suffix: Text | None = None
    decoder_prompt: (
        Annotated[TextOption | Annotated[TokenIds, Tag("<tokens>")], Discriminator(_kind_of_prompt)] | None
    ) = None

    @property
    def limit(self) -> int:
        """OpenAI's default where max_tokens is absent or null."""
        return 16 if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise field_error(
                "max_tokens", "max_tokens 0 makes sense with echo: true only, for the prompt's log-probabilities"
            )
        if self.num_choices > self.num_wanted and self.stream:
            raise field_error("best_of", "best_of above n is not available with stream: true: the best is known last")
        if self.suffix and self.echo:
            raise field_error("suffix", "suffix is not available with echo: true: the answer stands between both")
        if self.logprob_token_ids and self.echo:
            raise field_error("logprob_token_ids", "logprob_token_ids is not available with echo: true")
        return self

    @property
    def num_choices(self) -> int:
        """How many answers to each prompt are computed."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def num_wanted(self) -> int:
        """How many of the answers to each prompt are sent: the best ones."""
        return self.n or 1


def routes(service: Service) -> APIRouter:
    """/v1/completions."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)

    @router.post("/v1/completions", responses=EVENTS)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Complete one prompt or several."""
        return await service.respond(http, await begin_completion(body, http, service))

    return router


async def begin_completion(body: CompletionRequest, http: Request, service: Service) -> CompletionAnswer:
    """The answer to a request at its beginning. Raises ApiError."""
    service.check(body.model, http)
    model = service.model
    name = request_id_of(http, body)
    return await service.off_loop(
        http, lambda: CompletionAnswer(body, prompts_of(body, model), model, name), body.work_of_a_byte
    )


def wanted_of(request: CompletionRequest, fim: Fim | None = None) -> Wanted:
    """An echoed prompt's log-probabilities are reported as the answer's are; the best of several is told by them."""
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        both = (prompt_logprobs or 0, request.logprobs)
        prompt_logprobs = ALL_LOGPROBS if ALL_LOGPROBS in both else max(both)
    logprobs = request.logprobs
    if logprobs is None and request.num_choices > request.num_wanted:
        logprobs = 0
    return Wanted(request.limit, logprobs, prompt_logprobs, end_ids=() if fim is None else fim.end_ids)


def prompts_of(request: CompletionRequest, model: ServedModel) -> list[Prompt]:
    """The prompts of a completion request as token ids, cut to size where the request asks for that."""
    given = request.prompt
    parts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if len(parts) * request.num_choices > MAX_ANSWERS:
        raise bad_request(
            f"{len(parts)} prompts with n {request.num_choices}: a request may ask for {MAX_ANSWERS} answers", "n"
        )
    if request.echo and model.encoder is not None:
        raise bad_request("echo: answers of this model, an encoder-decoder, don't continue their prompts", "echo")
    fim = needed_fim(model) if request.suffix else None
    after = suffix_ids(request.suffix or "", model) if fim is not None else []
    wanted = wanted_of(request, fim)
    begin_ids = None if request.decoder_prompt is None else decoder_begin(request.decoder_prompt, model)
    prompts = []
    for part in parts:
        text = part if isinstance(part, str) else None
        if text is None:
            ids: list[int] = part  # type: ignore[assignment]  # mypy doesn't see that the first element tells the type
        else:
            must_fit = request.truncate_prompt_tokens is None
            adds_special = request.add_special_tokens and fim is None
            ids = encode(text, "prompt", model, add_special_tokens=adds_special, must_fit=must_fit)
        if fim is not None:
            begin = encode("", "prompt", model, add_special_tokens=request.add_special_tokens, must_fit=False)
            ids = fim.prompt(ids, after, begin)
        prompts.append(Prompt(fitted(ids, request, wanted, model, "prompt"), text, decoder_ids=begin_ids))
    check_total(prompts, request, "prompt")
    return prompts


class CompletionAnswer(OpenAIAnswer):
    """POST /v1/completions. With echo, the prompt stands before the answer, its log-probabilities before the answer's.

    The echoed text is the tokens', special ones written out, without those that the tokenizer put before the client's
    own text (a BOS token).
    """

    def __init__(self, request: CompletionRequest, prompts: list[Prompt], model: ServedModel, name: str) -> None:
        fim = fim_of(model) if request.suffix else None
        super().__init__(request, make_choices(prompts, request, wanted_of(request, fim), model), model)
        self._asked = request
        self._model = model
        self._head = head(f"cmpl-{name}", "text_completion", request, model)
        self._name = names_of(model.tokenizer, as_ids=names_ids(request, model))
        self._echoes = [_echo(prompt, model) for prompt in prompts] if request.echo else []

    def whole(self, deltas: list[Delta]) -> Json:
        choices = (self._choice(delta) | {"index": index} for index, delta in enumerate(self._best(deltas)))
        usage = usage_of(self.choices).as_json()
        return {**self._head, "choices": choices, "usage": usage, **drafted_of(self.choices)}

    def _best(self, deltas: list[Delta]) -> list[Delta]:
        """The answers that are sent: of each prompt's those whose tokens are likeliest on average; beams are sorted."""
        asked = self._asked
        total = asked.num_choices
        if total == asked.num_wanted:
            return deltas
        kept = []
        for begin in range(0, len(deltas), total):
            of_prompt = deltas[begin : begin + total]
            if not asked.use_beam_search:
                of_prompt.sort(key=_mean_logprob, reverse=True)
            kept += of_prompt[: asked.num_wanted]
        return kept

    def chunks(self, delta: Delta) -> list[Json]:
        rendered = self._choice(delta)
        silent = not rendered["text"] and rendered["logprobs"] is None and delta.finish_reason is None
        return [] if silent and not self.request.return_token_ids else [self.frame([rendered])]

    def frame(self, choices: list[Json]) -> Json:
        return {**self._head, "choices": choices}

    def _choice(self, delta: Delta) -> Json:
        request = self._asked
        prompt_ids = self.choices[delta.index].request.prompt_ids
        text = text_of(delta.parts)
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
            else completion_logprobs(self._shown(entries, request.logprobs), ids, offsets, self._name),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if request.return_token_ids:
            content["token_ids"] = delta.token_ids
        return content | about_prompt(request, delta, prompt_ids, self._model)

    def _shown(self, entries: Sequence[Any], count: int) -> Sequence[Any]:
        """logprobs says how many of the likeliest tokens are shown; those that the request names are shown all."""
        return entries if self._asked.logprob_token_ids or count == ALL_LOGPROBS else _cut(entries, count)


def _mean_logprob(delta: Delta) -> float:
    return sum(entry.logprob for entry in delta.logprobs) / max(1, len(delta.logprobs))


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
