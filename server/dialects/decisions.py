"""SGLang's /v1/decisions and /v1/systemone: questions about a text, answered with a probability for each answer.

Nothing is generated. Each answer has a label of one token, and its probability is read from the model's next token
behind the question; all questions of a request are asked at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from octavo.server.dialects.chat_request import chat_request_of
from octavo.server.dialects.conversation import render_request, rendered
from octavo.server.dialects.decisions_request import (
    LETTERS,
    PROMPT_FORMAT_VERSION,
    DecisionRequest,
    Question,
    SystemOneRequest,
    written,
)
from octavo.server.dialects.fields import MAX_TOKENS_SENT, GenerationRequest
from octavo.server.dialects.thinking import switched
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import RESPONSES, ApiError, bad_request, interrupted, too_long
from octavo.server.generation import Choice, fold, make_choices, usage_of
from octavo.server.prompts import Prompt, Wanted, encode
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute

Json = dict[str, Any]

PAIRS = tuple(first + second for first, second in product(LETTERS, LETTERS))
PLAIN: Json = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
"""How the one token is chosen that the engine makes of each question: in the way that costs nothing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as token ids, and the label of each of its answers."""

    question: Question
    token_ids: list[int]
    label_ids: list[int]


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a prompt that is tokenized by itself: what follows its last special token, or all of it."""

    text: str
    token_ids: list[int]
    is_short: bool

    @classmethod
    def of(cls, prompt: str, token_ids: list[int], model: ServedModel) -> Tail:
        tokenizer = model.tokenizer
        places = (place for place in reversed(range(len(token_ids))) if token_ids[place] in tokenizer.special_ids)
        place = next(places, None)
        if place is not None:
            _, mark, text = prompt.rpartition(tokenizer.token_name(token_ids[place]))
            if mark and tokenizer.encode(text, add_special_tokens=False) == token_ids[place + 1 :]:
                return cls(text, token_ids[place + 1 :], is_short=True)
        return cls(prompt, token_ids, is_short=False)

    def label_id(self, label: str, model: ServedModel) -> int | None:
        """The one token that the label is behind this text; None where it is none, or several."""
        *same, last = model.tokenizer.encode(self.text + label, add_special_tokens=False)
        return last if same == self.token_ids else None


@dataclass(frozen=True, slots=True)
class Scored:
    """A question's answer. mass: the probability that the model says one of the labels at all."""

    asked: Asked
    probabilities: list[float]
    mass: float

    @property
    def by_name(self) -> dict[str, float]:
        return dict(zip(self.asked.question.names, self.probabilities, strict=True))

    @property
    def likeliest(self) -> str:
        return max(self.by_name, key=self.by_name.__getitem__)

    @property
    def level(self) -> float:
        """The expected one."""
        return math.fsum(level * probability for level, probability in enumerate(self.probabilities))


def routes(service: Service) -> APIRouter:
    """/v1/decisions, /v1/systemone."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)

    @router.post("/v1/decisions")
    async def decisions(body: DecisionRequest, http: Request) -> Response:
        """Answer questions about an input by the probabilities of their answers."""
        service.check(body.model, http)
        scored, usage = await _scored(body.plain(), written(body.input), body, body.temperature, http, service)
        answers = {it.asked.question.key: _decision(it, shows_tokens=body.return_prompt_token_ids) for it in scored}
        return JsonResponse(
            encode_json(
                {
                    "object": "decisions",
                    "model": body.model or service.model.name,
                    "prompt_format_version": PROMPT_FORMAT_VERSION,
                    "answers": answers,
                    "usage": usage,
                }
            )
        )

    @router.post("/v1/systemone")
    async def systemone(body: SystemOneRequest, http: Request) -> Response:
        """The same in the shapes of System One."""
        service.check(body.model, http)
        scored, usage = await _scored(body.plain(), written(body.state), body, 1.0, http, service)
        is_adapter = service.model.adapter(body.model) is not None
        return JsonResponse(
            encode_json(
                {
                    "model": body.model if is_adapter else service.model.name,
                    "answers": {it.asked.question.key: _system_one(it) for it in scored},
                    "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": 0},
                }
            )
        )

    return router


async def _scored(
    questions: Sequence[Question],
    about: str,
    body: DecisionRequest | SystemOneRequest,
    temperature: float,
    http: Request,
    service: Service,
) -> tuple[list[Scored], Json]:
    """The answers, of the model or the adapter that is asked, and how many tokens were read. Raises ApiError."""
    model = service.model
    if model.encoder is not None:
        raise bad_request(f"the model {model.name!r}, an encoder-decoder, doesn't go on from a question", "model")
    variables = _without_thinking(body.chat_template_kwargs or {}, model)
    asked: list[Asked] = []
    total = 0
    pairs = await _pairs_for(questions, variables, http, service)
    for question in questions:
        asked.append(await _asked(question, about, variables, _labels(question, pairs), http, service))
        total += len(asked[-1].token_ids)
        if total > MAX_TOKENS_SENT:
            raise bad_request(
                f"questions: {total} tokens of prompts; a request may send {MAX_TOKENS_SENT}", "questions"
            )
    choices = [choice for each in asked for choice in _choices(each, body.model, model)]
    for index, choice in enumerate(choices):
        choice.index = index
    deltas = await fold(service.steps(http, choices, ()), len(choices))
    scored = []
    for each, delta in zip(asked, deltas, strict=True):
        if delta.finish_reason == "abort":
            raise interrupted()
        scored.append(_score(each, delta.logprobs[0].top_logprobs, temperature))
    usage = usage_of(choices).as_json() | {"completion_tokens": 0, "total_tokens": total}
    usage.pop("completion_tokens_details", None)
    return scored, usage


def _without_thinking(variables: Json, model: ServedModel) -> Json:
    """The template's variables by which the answer follows at once. Raises ApiError where it can't."""
    reasoning = model.formats.found.reasoning
    can_tell = reasoning is None or reasoning.can_disable  # else what the request says is looked for in the prompt
    off = switched(model, "chat_template_kwargs", wants=False) if can_tell else {}
    for name, value in off.items():
        if variables.get(name, value) != value:
            raise bad_request(
                f"chat_template_kwargs.{name} {variables[name]!r}: an answer is read where the model would begin to "
                "think; leave it out",
                "chat_template_kwargs",
            )
    return off | variables


async def _asked(
    question: Question, about: str, variables: Json, labels: Sequence[str], http: Request, service: Service
) -> Asked:
    model = service.model
    prompt = await _rendered(question.prompt(about, labels), variables, http, service)
    _check_thoughts(prompt, model)
    try:
        return await service.off_loop(http, partial(_tokenized, question, prompt, labels, model), 8)
    except ApiError as error:
        message = f"questions: {question.key[:80]!r}: {error.message}"
        raise ApiError(error.status, message, param="questions", code=error.code) from None


def _check_thoughts(prompt: str, model: ServedModel) -> None:
    """Raise ApiError where the model would think behind this prompt, and not answer."""
    reasoning = model.formats.found.reasoning
    if reasoning is None:
        return
    if reasoning.opened_by(prompt) or not (reasoning.can_disable or reasoning.closed_by(prompt)):
        raise bad_request(
            "chat_template_kwargs: this model thinks before it answers, and these variables of its template don't "
            "switch that off",
            "chat_template_kwargs",
        )


async def _rendered(content: str, variables: Json, http: Request, service: Service) -> str:
    fields = {"messages": [{"role": "user", "content": content}], "chat_template_kwargs": variables}
    model = service.model
    job = await service.off_loop(http, lambda: render_request(chat_request_of(fields, {}), model))
    return await rendered(job, model)


def _labels(question: Question, pairs: Sequence[str]) -> Sequence[str]:
    """What the model answers with."""
    if question.kind != "choice":
        return question.names
    count = len(question.names)
    return LETTERS[:count] if count <= len(LETTERS) else pairs[:count]


async def _pairs_for(questions: Sequence[Question], variables: Json, http: Request, service: Service) -> list[str]:
    """The labels of the question with most options, where the alphabet is too short for it. Raises ApiError."""
    most = max((len(question.names) for question in questions if question.kind == "choice"), default=0)
    if most <= len(LETTERS):
        return []
    prompt = await _rendered("x", variables, http, service)
    return await service.off_loop(http, partial(_pairs, prompt, most, service.model))


def _pairs(prompt: str, count: int, model: ServedModel) -> list[str]:
    """Pairs of letters that are a token each, behind a prompt that ends as this one does. Raises ApiError."""
    tail = Tail.of(prompt, model.tokenizer.encode(prompt, add_special_tokens=False), model)
    found: dict[int, str] = {}
    for pair in PAIRS if tail.is_short else ():
        token_id = tail.label_id(pair, model)
        if token_id is not None:
            found.setdefault(token_id, pair)
        if len(found) == count:
            return list(found.values())
    raise bad_request(
        f"questions: {count} options; this model's tokenizer has labels for {max(len(found), len(LETTERS))}",
        "questions",
    )


def _tokenized(question: Question, prompt: str, labels: Sequence[str], model: ServedModel) -> Asked:
    ids = encode(prompt, "questions", model, add_special_tokens=False, must_fit=True)
    if len(ids) >= model.max_model_len:
        raise too_long(
            model.max_model_len, f"However, its prompt has {len(ids)} tokens. Shorten the input", "questions"
        )
    tail = Tail.of(prompt, ids, model)
    found: dict[int, str] = {}
    for label in labels:
        token_id = tail.label_id(label, model)
        if token_id is None or token_id in found:
            raise bad_request(
                f"the label {label!r} is not one token of its own behind this model's prompt, so its probability can't "
                "be read"
            )
        found[token_id] = label
    return Asked(question, ids, list(found))


def _choices(asked: Asked, name: str | None, model: ServedModel) -> list[Choice]:
    request = GenerationRequest(model=name, logprob_token_ids=asked.label_ids, **PLAIN)
    return make_choices([Prompt(asked.token_ids)], request, Wanted(1, 0, None), model)


def _score(asked: Asked, logprobs: Sequence[float], temperature: float) -> Scored:
    best = max(logprobs)
    weights = [math.exp((logprob - best) / temperature) for logprob in logprobs]
    total = math.fsum(weights)
    return Scored(asked, [weight / total for weight in weights], math.fsum(map(math.exp, logprobs)))


def _decision(scored: Scored, *, shows_tokens: bool) -> Json:
    kind = scored.asked.question.kind
    answer: Json = {"type": kind, "probabilities": scored.by_name, "label_mass": scored.mass}
    if kind == "choice":
        answer["choice"] = scored.likeliest
    elif kind == "score":
        answer["score"] = scored.level
    if shows_tokens:
        answer |= {"prompt_token_ids": scored.asked.token_ids, "label_token_ids": scored.asked.label_ids}
    return answer


def _system_one(scored: Scored) -> Json:
    question = scored.asked.question
    probabilities = scored.probabilities
    if question.kind == "yes_no":
        return {"type": "noul", "noul": probabilities[0], "x_label_mass": scored.mass}
    answer: Json = {"type": question.kind, "probabilities": scored.by_name, "x_label_mass": scored.mass}
    if question.kind == "choice":
        return answer | {"choice": scored.likeliest, "confidence": _choice_confidence(probabilities)}
    legend = dict(zip(question.names, question.details, strict=True))
    return answer | {"score": scored.level, "confidence": _score_confidence(probabilities), "legend": legend}


def _choice_confidence(probabilities: Sequence[float]) -> float:
    """How far the likeliest option stands out: 0 where all are alike, 1 where the others have nothing."""
    count = len(probabilities)
    return 1.0 if count == 1 else _within_one((count * max(probabilities) - 1) / (count - 1))


def _score_confidence(probabilities: Sequence[float]) -> float:
    """How near the others are to the likeliest level, in place of being spread over all of them."""
    count = len(probabilities)
    if count == 1:
        return 1.0
    top = max(range(count), key=probabilities.__getitem__)
    spread = math.fsum(probability * abs(level - top) for level, probability in enumerate(probabilities))
    even = math.fsum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return _within_one(1 - spread / even)


def _within_one(value: float) -> float:
    return min(1.0, max(0.0, value))
