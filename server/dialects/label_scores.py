"""SGLang's /v1/score and vLLM's /generative_scoring: how probable labels are as a model's next token.

Nothing is generated: probabilities are the model's own, whatever it would be sampled by. Queries that items share are
read from the prefix cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from octavo.server.dialects.fields import MAX_TOKENS_SENT, GenerationRequest
from octavo.server.dialects.label_scores_request import GenerativeScoringRequest, LabelScoreRequest
from octavo.server.encoding import JsonResponse, encode_in_turns
from octavo.server.errors import RESPONSES, bad_request, interrupted, too_long
from octavo.server.generation import fold, make_choices
from octavo.server.hints import hints_in
from octavo.server.pooled_inputs import repeated
from octavo.server.prompts import Prompt, Wanted, encode, in_vocabulary
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute

Json = dict[str, Any]


def routes(service: Service) -> APIRouter:
    """/generative_scoring; /v1/score is in pooled_scores.py."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)

    @router.post("/generative_scoring")
    async def generative_scoring(body: GenerativeScoringRequest, http: Request) -> Response:
        """The first label's probability behind the query and each item."""
        scores, usage = await label_scores(body, http, service)
        answer = {
            "id": f"generative-scoring-{body.request_id or http.state.request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or service.model.name,
            "data": [{"index": i, "object": "score", "score": each[0]} for i, each in enumerate(scores)],
        }
        return JsonResponse(*await encode_in_turns(answer | {"usage": usage}))

    return router


async def scored_labels(body: LabelScoreRequest, http: Request, service: Service) -> Response:
    """The answer to SGLang's /v1/score."""
    scores, usage = await label_scores(body, http, service)
    answer = {"object": "scoring", "scores": scores, "model": body.model or service.model.name, "usage": usage}
    return JsonResponse(*await encode_in_turns(answer))


async def label_scores(body: LabelScoreRequest, http: Request, service: Service) -> tuple[list[list[float]], Json]:
    """Of each item the labels' probabilities, and how many tokens were read. Raises ApiError."""
    model = service.model
    service.check(body.model, http)
    if model.encoder is not None:
        raise bad_request(f"the model {model.name!r}, an encoder-decoder, doesn't go on from a query", "model")
    in_vocabulary(body.label_token_ids, "label_token_ids", model)
    beside = 0 if isinstance(body.query, list) else repeated(body.query, len(body.texts or ()), "items")
    prompts = await service.off_loop(http, lambda: _prompts(body, model), beside=beside)
    labels = list(dict.fromkeys(body.label_token_ids))
    salt = body.cache_salt if isinstance(body, GenerativeScoringRequest) else None
    request = GenerationRequest(
        model=body.model,
        logprob_token_ids=labels,
        temperature=0,
        priority=body.priority,
        cache_salt=salt,
        user=body.user,
    )
    choices = make_choices(prompts, request, Wanted(1, 0, None), model)
    for index, choice in enumerate(choices):
        choice.index = index
    deltas = await fold(service.steps(http, choices, hints_in(body)), len(choices))
    scores = []
    for delta in deltas:
        if delta.finish_reason == "abort":
            raise interrupted()
        logprobs = dict(zip(labels, delta.logprobs[0].top_logprobs, strict=True))
        scores.append(_scores([logprobs[label] for label in body.label_token_ids], among_labels=body.apply_softmax))
    total = sum(len(prompt.token_ids) for prompt in prompts)
    return scores, {"prompt_tokens": total, "completion_tokens": 0, "total_tokens": total}


def _scores(logprobs: Sequence[float], *, among_labels: bool) -> list[float]:
    best = max(logprobs)
    if not among_labels or best == -math.inf:
        return [math.exp(logprob) for logprob in logprobs]
    weights = [math.exp(logprob - best) for logprob in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _prompts(body: LabelScoreRequest, model: ServedModel) -> list[Prompt]:
    """A prompt for each item. Raises ApiError."""
    found: list[Prompt] = []
    total = 0
    for ids in _token_ids(body, model):
        if not ids:
            raise bad_request("query and items are empty, and this tokenizer adds no beginning token", "items")
        if len(ids) >= model.max_model_len:
            raise too_long(
                model.max_model_len,
                f"However, query and item {len(found)} have {len(ids)} tokens, and a label is to follow. Shorten them",
                "items",
            )
        total += len(ids)
        if total > MAX_TOKENS_SENT:
            raise bad_request(
                f"items: {total} tokens in the first {len(found) + 1} prompts; a request may send {MAX_TOKENS_SENT}. "
                "Make several of it",
                "items",
            )
        found.append(Prompt(ids))
    return found


def _token_ids(body: LabelScoreRequest, model: ServedModel) -> Iterator[list[int]]:
    """Those of each prompt, one after the other."""
    query = body.query
    if isinstance(query, list):
        in_vocabulary(query, "query", model)
        for item in body.items:
            ids: list[int] = item  # type: ignore[assignment]  # as its query
            in_vocabulary(ids, "items", model)
            yield [*ids, *query] if body.item_first else [*query, *ids]
        return
    texts = body.texts or []
    if not isinstance(body, GenerativeScoringRequest):
        for text in texts:
            whole = text + query if body.item_first else query + text
            yield encode(whole, "items", model, add_special_tokens=True, must_fit=True)
        return
    first = encode(query, "query", model, add_special_tokens=body.add_special_tokens, must_fit=True)
    for text in texts:
        other = encode(text, "items", model, add_special_tokens=False, must_fit=True)
        yield [*other, *first] if body.item_first else [*first, *other]
