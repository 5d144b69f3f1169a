"""/api/embed and /api/embeddings, as Ollama has them: what is too long is cut, unless the request says otherwise."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from octavo.runtime.messages import PoolingParams
from octavo.server.dialects.fields import Flag, Strict, Text
from octavo.server.dialects.ollama_models import OllamaRoute, plain_name
from octavo.server.dialects.ollama_request import Options
from octavo.server.dialects.pooled import checked_dimensions
from octavo.server.dialects.pooled_request import Positive, TextOrTexts
from octavo.server.encoding import JsonResponse, encode_in_turns
from octavo.server.errors import OLLAMA_RESPONSES
from octavo.server.hints import Hint
from octavo.server.pooled_inputs import Cut, PooledPrompt, text_prompt, within_total
from octavo.server.pooled_text import PooledText
from octavo.server.pooling import PooledResult
from octavo.server.served_model import ServedModel
from octavo.server.service import Service


class OllamaEmbedRequest(Strict):
    """POST /api/embed."""

    model: Text
    input: TextOrTexts
    truncate: Flag = True
    dimensions: Positive | None = None
    options: Options | None = None
    keep_alive: Hint = None


class OllamaEmbeddingsRequest(Strict):
    """POST /api/embeddings, which came before."""

    model: Text
    prompt: Text
    options: Options | None = None
    keep_alive: Hint = None


def routes(service: Service) -> APIRouter:
    """The two routes."""
    router = APIRouter(route_class=OllamaRoute, responses=OLLAMA_RESPONSES)
    model = service.model

    @router.post("/api/embed")
    async def embed(body: OllamaEmbedRequest, http: Request) -> Response:
        """Embeddings of texts."""
        begun = time.perf_counter_ns()
        pooled = service.check_pooled(plain_name(body.model, model), http, "embed")
        size = checked_dimensions(body.dimensions, pooled)
        texts = [body.input] if isinstance(body.input, str) else body.input
        cut = Cut(-1 if body.truncate else None)
        results = await _embedded(texts, cut, size, pooled, http)
        answer = {
            "model": body.model,
            "embeddings": [result.vector() for result in results],
            "total_duration": time.perf_counter_ns() - begun,
            "load_duration": 0,
            "prompt_eval_count": sum(result.num_tokens for result in results),
        }
        return JsonResponse(*await encode_in_turns(answer))

    @router.post("/api/embeddings")
    async def embeddings(body: OllamaEmbeddingsRequest, http: Request) -> Response:
        """The embedding of a text."""
        pooled = service.check_pooled(plain_name(body.model, model), http, "embed")
        (result,) = await _embedded([body.prompt], Cut(-1), None, pooled, http)
        return JsonResponse(*await encode_in_turns({"embedding": result.vector()}))

    async def _embedded(
        texts: list[str], cut: Cut, size: int | None, pooled: PooledText, http: Request
    ) -> list[PooledResult]:
        prompts = await service.off_loop(http, lambda: _prompts(texts, cut, pooled, model))
        return await service.pooled(http, prompts, PoolingParams("embed", size), 0)

    return router


def _prompts(texts: list[str], cut: Cut, pooled: PooledText, model: ServedModel) -> list[PooledPrompt]:
    return within_total((text_prompt(text, "input", model, cut, before=pooled.prompt) for text in texts), "input")
