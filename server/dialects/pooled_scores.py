"""/score and /rerank: how well texts fit each other, as vLLM, Jina and Cohere have it."""

from __future__ import annotations

import math
from functools import partial
from operator import mul
from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import Discriminator, Tag

from octavo.runtime.messages import PoolingParams
from octavo.server.dialects.label_scores import scored_labels
from octavo.server.dialects.label_scores_request import LabelScoreRequest
from octavo.server.dialects.pooled import answered, headed, name_of, sent
from octavo.server.dialects.pooled_request import RerankRequest, ScoreRequest
from octavo.server.errors import RESPONSES, bad_request
from octavo.server.pooled_inputs import Cut, PooledPrompt, repeated, text_prompt, within_total
from octavo.server.pooled_text import PooledText
from octavo.server.pooling import PooledResult
from octavo.server.reranker_template import asked_pair
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute

LABELS = ("label_token_ids", "items", "query")  # names of SGLang's /v1/score


def _kind_of_score(body: object) -> str:
    return "<labels>" if isinstance(body, dict) and any(name in body for name in LABELS) else "<texts>"


AnyScoreRequest = Annotated[
    Annotated[ScoreRequest, Tag("<texts>")] | Annotated[LabelScoreRequest, Tag("<labels>")],
    Discriminator(_kind_of_score),
]


def routes(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    model = service.model

    @router.post("/v1/score", include_in_schema=False)
    @router.post("/score")
    async def score(body: Annotated[AnyScoreRequest, Body()], http: Request) -> Response:
        """How well texts fit each other: a cross-encoder's score of each pair, or the cosine of their embeddings.

        With label_token_ids, of a model that generates: how probable each is as the next token (SGLang's).
        """
        if isinstance(body, LabelScoreRequest):
            return await scored_labels(body, http, service)
        one, other = body.sides
        scores, results = await scored(body, one * (len(other) if len(one) == 1 else 1), other, http, service)
        data = ({"index": i, "object": "score", "score": value} for i, value in enumerate(scores))
        return await sent(headed("score", body, http, model) | {"data": data}, results)

    @router.post("/v1/rerank", include_in_schema=False)
    @router.post("/v2/rerank", include_in_schema=False)
    @router.post("/rerank")
    async def rerank(body: RerankRequest, http: Request) -> Response:
        """Documents by their score, best first."""
        texts = body.texts
        scores, results = await scored(body, [body.query] * len(texts), texts, http, service)
        order = sorted(range(len(texts)), key=scores.__getitem__, reverse=True)
        shows = body.return_documents is not False
        found = [
            {"index": i, "relevance_score": scores[i]} | ({"document": {"text": texts[i]}} if shows else {})
            for i in order[: body.top_n or None]
        ]
        head = {"id": name_of(body, http, "rerank"), "model": body.model or model.name, "results": found}
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        return await sent(head | {"meta": meta}, results)

    return router


async def scored(
    body: ScoreRequest | RerankRequest, one: list[str], other: list[str], http: Request, service: Service
) -> tuple[list[float], list[PooledResult]]:
    """A score for each pair, and what was computed for it. Raises ApiError."""
    model = service.model
    by_embedding = model.pooled is not None and model.pooled.embeds
    pooled = service.check_pooled(body.model, http, "embed" if by_embedding else "classify")
    of_document = None if isinstance(body, ScoreRequest) else body.max_tokens_per_doc
    if not by_embedding:
        if pooled.facts.size != 1:
            raise bad_request(
                f"the model {model.name!r} has {pooled.facts.size} labels, and a score is what a model of one says; "
                "POST /classify works",
                "model",
            )
        params = PoolingParams("classify", use_activation=body.use_activation)
        pairs = partial(_pairs, one, other, body, of_document, model)
        asked = (body.instruction or "") + (one[0] if len(set(one)) == 1 else "")
        beside = repeated(asked, len(one), "documents") if pooled.facts.template else 0
        results = await answered(body, params, pairs, http, service, beside)
        return [result.vector()[0] for result in results], results
    if body.instruction is not None:
        raise bad_request("instruction: this model's embeddings take prompts; prompt_name picks one", "instruction")
    if body.use_activation is not None:
        raise bad_request("use_activation: a cosine of embeddings has no activation; leave it out", "use_activation")
    firsts = list(dict.fromkeys(one))
    distinct = firsts + other
    of_documents = body.cut if of_document is None else body.cut.within(min(of_document, model.max_model_len))
    cuts = [body.cut] * len(firsts) + [of_documents] * len(other)
    results = await answered(
        body,
        PoolingParams("embed", use_activation=True),
        lambda: _each(distinct, cuts, pooled, model),
        http,
        service,
        repeated(pooled.prompt, len(distinct), "documents"),
    )
    vectors = [result.values for result in results]
    places = {text: place for place, text in enumerate(firsts)}
    scores = [math.fsum(map(mul, vectors[places[text]], vectors[len(firsts) + i])) for i, text in enumerate(one)]
    return scores, results


def _each(texts: list[str], cuts: list[Cut], pooled: PooledText, model: ServedModel) -> list[PooledPrompt]:
    prompts = (
        text_prompt(text, "documents", model, cut, before=pooled.prompt) for text, cut in zip(texts, cuts, strict=True)
    )
    return within_total(prompts, "documents")


def _pairs(
    one: list[str],
    other: list[str],
    body: ScoreRequest | RerankRequest,
    of_document: int | None,
    model: ServedModel,
) -> list[PooledPrompt]:
    known: dict[str, list[int]] = {}
    prompts = (
        asked_pair(
            first, second, "documents", model, body.cut, body.instruction, most_of_second=of_document, known=known
        )
        for first, second in zip(one, other, strict=True)
    )
    return within_total(prompts, "documents")
