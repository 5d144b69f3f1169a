"""/v1/embeddings, /pooling and /classify: what models say of texts, as OpenAI and vLLM have it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response

from octavo.runtime.messages import PoolingParams
from octavo.server.dialects.conversation import image_sources, render_request, rendered
from octavo.server.dialects.pooled_request import (
    AnyClassifyRequest,
    AnyEmbeddingRequest,
    AnyPoolingRequest,
    ClassifyRequest,
    EmbeddingOptions,
    EmbeddingRequest,
    Messages,
    PooledRequest,
)
from octavo.server.encoding import JsonResponse, encode_in_turns
from octavo.server.errors import RESPONSES, bad_request
from octavo.server.hints import hints_in
from octavo.server.pooled_inputs import PooledPrompt, ids_prompt, repeated, text_prompt, within_total
from octavo.server.pooled_numbers import in_base64
from octavo.server.pooled_text import PooledText
from octavo.server.pooling import PooledResult
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute

Json = dict[str, Any]


def routes(service: Service) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    model = service.model

    @router.post("/v1/embeddings")
    async def embeddings(body: Annotated[AnyEmbeddingRequest, Body()], http: Request) -> Response:
        """Embeddings of texts, or of a conversation."""
        pooled = service.check_pooled(body.model, http, "embed")
        params = PoolingParams("embed", checked_dimensions(body.dimensions, pooled), body.normalizes)
        prompts, beside = await _asked(body, pooled, http, service)
        results = await answered(body, params, prompts, http, service, beside)
        shown = _shower(body)
        data = ({"object": "embedding", "index": i, "embedding": shown(it)} for i, it in enumerate(results))
        return await sent({"object": "list", "data": data, "model": body.model or model.name}, results)

    @router.post("/pooling")
    async def pooling(body: Annotated[AnyPoolingRequest, Body()], http: Request) -> Response:
        """Any task of the model, with what its pooler made of each text, or of each token."""
        own = "embed" if model.pooled is None else model.pooled.facts.tasks[0]
        task = body.task or own
        pooled = service.check_pooled(body.model, http, task)
        params = PoolingParams(task, checked_dimensions(body.dimensions, pooled), body.normalizes)
        prompts, beside = await _asked(body, pooled, http, service)
        results = await answered(body, params, prompts, http, service, beside)
        shown = _shower(body, by_rows=task.startswith("token_"))
        data = ({"object": "pooling", "index": i, "data": shown(it)} for i, it in enumerate(results))
        return await sent(headed("pool", body, http, model) | {"data": data}, results)

    @router.post("/v1/classify", include_in_schema=False)  # SGLang's name
    @router.post("/classify")
    async def classify(body: Annotated[AnyClassifyRequest, Body()], http: Request) -> Response:
        """The probabilities of a classifier's labels."""
        pooled = service.check_pooled(body.model, http, "classify")
        params = PoolingParams("classify", use_activation=body.use_activation)
        prompts, beside = await _asked(body, pooled, http, service)
        results = await answered(body, params, prompts, http, service, beside)
        data = (_labelled(i, it.vector(), pooled) for i, it in enumerate(results))
        return await sent(headed("classify", body, http, model) | {"data": data}, results)

    return router


async def answered(
    body: PooledRequest,
    params: PoolingParams,
    prompts: Callable[[], list[PooledPrompt]],
    http: Request,
    service: Service,
    beside: int = 0,
) -> list[PooledResult]:
    """What the model makes of each prompt of a request. beside: as of `off_loop`. Raises ApiError."""
    service.count_hints(hints_in(body))
    made = await service.off_loop(http, prompts, beside=beside)
    return await service.pooled(http, made, params, body.priority or 0, body.user_name)


async def sent(content: Json, results: Sequence[PooledResult]) -> Response:
    """An answer with the tokens that it took."""
    total = sum(result.num_tokens for result in results)
    usage = {"prompt_tokens": total, "total_tokens": total}
    return JsonResponse(*await encode_in_turns(content | {"usage": usage}))


def headed(kind: str, body: PooledRequest, http: Request, model: ServedModel) -> Json:
    """What stands before the data of vLLM's answers."""
    name = body.model or model.name
    return {"id": name_of(body, http, kind), "object": "list", "created": int(time.time()), "model": name}


def name_of(body: PooledRequest, http: Request, kind: str) -> str:
    """What the answer is called."""
    return f"{kind}-{body.request_id or http.state.request_id}"


def checked_dimensions(dimensions: int | None, pooled: PooledText, name: str = "dimensions") -> int | None:
    """The size that embeddings are cut to; None: the server's own. Raises ApiError where the checkpoint wasn't trained
    for it.
    """
    if dimensions is None or dimensions == pooled.facts.size:
        return dimensions
    known = pooled.facts.dimensions
    size = pooled.facts.size
    if known == ():
        raise bad_request(
            f"{name} {dimensions}: this checkpoint's embeddings have {size} numbers, and config.json doesn't say that "
            "they can be cut (is_matryoshka or matryoshka_dimensions)",
            name,
        )
    if known is not None and dimensions not in known:
        raise bad_request(f"{name} {dimensions}: embeddings of {', '.join(map(str, known))} numbers work", name)
    if dimensions > size:
        raise bad_request(f"{name} {dimensions}: embeddings have {size} numbers", name)
    return dimensions


def prompts_of(body: EmbeddingRequest | ClassifyRequest, pooled: PooledText, model: ServedModel) -> list[PooledPrompt]:
    """The prompts of a request's input. Raises ApiError."""
    given = body.input
    before = prompt_before(body, pooled) if isinstance(body, EmbeddingRequest) else ""
    if isinstance(given, str):
        given = [given]
    special = body.add_special_tokens
    lists = [given] if given and isinstance(given[0], int) else given
    if lists and not isinstance(lists[0], str) and isinstance(body, EmbeddingRequest):
        for name in ("prompt", "prompt_name"):
            if getattr(body, name) is not None:
                raise bad_request(f"{name}: token ids have no text before them; leave it out, or send text", name)
    prompts = (
        text_prompt(each, "input", model, body.cut, before=before, add_special_tokens=special)
        if isinstance(each, str)
        else ids_prompt(each, "input", model, body.cut)  # type: ignore[arg-type]  # told by its first
        for each in lists
    )
    return within_total(prompts, "input")


async def _asked(
    body: PooledRequest, pooled: PooledText, http: Request, service: Service
) -> tuple[Callable[[], list[PooledPrompt]], int]:
    """How the prompts of a request are made, and `beside` of that. Raises ApiError."""
    model = service.model
    if isinstance(body, EmbeddingRequest | ClassifyRequest):
        beside = _beside(body, pooled) if isinstance(body, EmbeddingRequest) else 0
        return partial(prompts_of, body, pooled, model), beside
    assert isinstance(body, Messages)
    image_sources(body, model)  # refuses them
    text = await rendered(await service.off_loop(http, partial(render_request, body, model)), model)
    special = body.add_special_tokens
    cut = body.cut
    return lambda: [text_prompt(text, "messages", model, cut, add_special_tokens=special)], len(text)


def _beside(body: EmbeddingRequest, pooled: PooledText) -> int:
    given = body.input
    is_many = not isinstance(given, str) and bool(given) and isinstance(given[0], str)
    return repeated(prompt_before(body, pooled), len(given) if is_many else 1, "prompt")


def prompt_before(body: EmbeddingRequest, pooled: PooledText) -> str:
    """What stands before each text. Raises ApiError."""
    return named_prompt(body.prompt_name, pooled) if body.prompt is None else body.prompt


def named_prompt(name: str | None, pooled: PooledText) -> str:
    """One of the model's prompts; None: its default. Raises ApiError."""
    if name is None:
        return pooled.prompt
    found = pooled.prompts.get(name)
    if found is None:
        known = f"; {', '.join(pooled.prompts)} are known" if pooled.prompts else ", which has none"
        raise bad_request(f"prompt_name {name[:80]!r} is none of this model's prompts{known}", "prompt_name")
    return found


def _shower(body: EmbeddingOptions, *, by_rows: bool = False) -> Callable[[PooledResult], Any]:
    """How results are told."""
    number_type = body.embed_dtype or "float32"
    if body.encoding_format == "base64":
        return lambda it: in_base64(it.pooled.data, number_type)
    if number_type != "float32":
        raise bad_request(f"embed_dtype {number_type}: encoding_format base64 has such numbers", "embed_dtype")
    return (lambda it: it.rows()) if by_rows else (lambda it: it.vector())


def _labelled(index: int, probabilities: list[float], pooled: PooledText) -> Json:
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return {
        "index": index,
        "label": pooled.labels[best],
        "probs": probabilities,
        "num_classes": len(probabilities),
    }
