"""Embeddings in the shapes of Cohere (/v2/embed) and of SGLang (/encode)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from octavo.runtime.messages import PoolingParams
from octavo.server.dialects.pooled import checked_dimensions
from octavo.server.dialects.pooled_request import CohereEmbedRequest, EncodeRequest
from octavo.server.encoding import JsonResponse, encode_in_turns
from octavo.server.errors import RESPONSES, bad_request
from octavo.server.hints import hints_in
from octavo.server.pooled_inputs import Cut, PooledPrompt, ids_prompt, text_prompt, within_total
from octavo.server.pooled_numbers import in_base64, signs
from octavo.server.pooled_text import PooledText
from octavo.server.pooling import PooledResult
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute

PROMPTS = {  # names that sentence-transformers' prompts have for each of Cohere's types of input
    "search_query": ("search_query", "query"),
    "search_document": ("search_document", "document", "passage"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}
Json = dict[str, Any]


def routes(service: Service) -> APIRouter:
    """/v2/embed, /encode."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    model = service.model

    @router.post("/v2/embed")
    async def embed(body: CohereEmbedRequest, http: Request) -> Response:
        """Embeddings as Cohere has them; a type of input is the model's prompt of that name, where it has one."""
        pooled = service.check_pooled(body.model, http, "embed")
        size = checked_dimensions(body.output_dimension, pooled, "output_dimension")
        service.count_hints(hints_in(body))
        prompts = await service.off_loop(http, lambda: _cohere_prompts(body, pooled, model))
        results = await service.pooled(http, prompts, PoolingParams("embed", size), body.priority or 0)
        types = body.embedding_types or ["float"]
        total = sum(result.num_tokens for result in results)
        answer = {
            "id": http.state.request_id,
            "embeddings": {name: _in_type(name, results) for name in types},
            "texts": body.texts,
            "response_type": "embeddings_by_type",
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": total}},
        }
        return JsonResponse(*await encode_in_turns(answer))

    @router.post("/encode")
    async def encode(body: EncodeRequest, http: Request) -> Response:
        """Embeddings, or a classifier's scores, as SGLang has them."""
        task = "embed" if model.pooled is None else model.pooled.facts.tasks[0]
        pooled = service.check_pooled(None, http, task)
        size = checked_dimensions(body.dimensions, pooled)
        prompts, is_one = await service.off_loop(http, lambda: _encode_prompts(body, pooled, model))
        results = await service.pooled(http, prompts, PoolingParams(task, size), 0)
        name = body.rid or http.state.request_id
        answers = [
            {
                "embedding": result.vector(),
                "meta_info": {
                    "id": name if is_one else f"{name}-{number}",
                    "finish_reason": {"type": "stop"},
                    "prompt_tokens": result.num_tokens,
                },
            }
            for number, result in enumerate(results)
        ]
        return JsonResponse(*await encode_in_turns(answers[0] if is_one else answers))

    return router


def _cohere_prompts(body: CohereEmbedRequest, pooled: PooledText, model: ServedModel) -> list[PooledPrompt]:
    names = PROMPTS.get(body.input_type or "", ())
    before = next((pooled.prompts[name] for name in names if name in pooled.prompts), pooled.prompt)
    cut = body.cut_within(model.max_model_len)
    return within_total((text_prompt(text, "texts", model, cut, before=before) for text in body.texts), "texts")


def _in_type(name: str, results: list[PooledResult]) -> list[Any]:
    match name:
        case "base64":
            return [in_base64(result.pooled.data) for result in results]
        case "binary" | "ubinary":
            return [signs(result.vector(), is_signed=name == "binary") for result in results]
    return [result.vector() for result in results]


def _encode_prompts(body: EncodeRequest, pooled: PooledText, model: ServedModel) -> tuple[list[PooledPrompt], bool]:
    """The prompts, and whether there is one that isn't in a list. Raises ApiError."""
    if (body.text is None) == (body.input_ids is None):
        raise bad_request("text or input_ids: one of them is needed", "text")
    if body.text is not None:
        texts = [body.text] if isinstance(body.text, str) else body.text
        made = (text_prompt(text, "text", model, Cut(), before=pooled.prompt) for text in texts)
        is_one = isinstance(body.text, str)
    else:
        assert body.input_ids is not None
        is_one = isinstance(body.input_ids[0], int)
        lists = [body.input_ids] if is_one else body.input_ids
        made = (ids_prompt(ids, "input_ids", model, Cut()) for ids in lists)  # type: ignore[arg-type]
    return within_total(made, "text" if body.text is not None else "input_ids"), is_one
