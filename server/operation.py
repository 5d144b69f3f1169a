"""Routes for those who operate a server: how it is, what it is doing, and its prefix cache."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from octavo.server.engine_client import EngineClient
from octavo.server.errors import RESPONSES, ApiError
from octavo.server.metrics import CONTENT_TYPE, Metrics
from octavo.server.served_model import ServedModel
from octavo.version import VERSION

HEALTH_SECONDS = 30.0  # one step of a large model on a slow machine may take seconds; nothing healthy takes this


def engine_routes(client: EngineClient, counted: Metrics) -> APIRouter:
    """/health, /ping, /metrics, /load, /reset_prefix_cache."""
    router = APIRouter()

    @router.get("/health", responses={503: RESPONSES[503]})
    async def health() -> Response:
        """200 when the engine itself answers; 503 when it is dead, hangs, or the server is shutting down."""
        if not await client.ping(HEALTH_SECONDS):
            reason = client.refusal or f"the engine did not answer within {HEALTH_SECONDS:.0f} s"
            raise ApiError(503, reason)
        return Response(status_code=200)

    @router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
    async def ping() -> Response:
        """/health under SageMaker's name."""
        return await health()

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(counted.page(), media_type=CONTENT_TYPE)

    @router.get("/load")
    async def load() -> dict[str, int]:
        """How many answers are open, in the engine or in its queue (vLLM's name)."""
        return {"server_load": client.num_open}

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        """Forget all cached prefixes that no running request holds."""
        if client.refusal is not None:
            raise ApiError(503, client.refusal)
        client.reset_prefix_cache()
        return Response(status_code=200)

    return router


def model_routes(model: ServedModel) -> APIRouter:
    """/version, /server_info, /tokenizer_info."""
    router = APIRouter()

    @router.get("/version")
    async def version() -> dict[str, str]:
        """octavo's version."""
        return {"version": VERSION}

    @router.get("/server_info")
    async def server_info() -> dict[str, object]:
        """What is served, and within which limits."""
        return {
            "version": VERSION,
            "models": list(model.names),
            "max_model_len": model.max_model_len,
            "vocab_size": model.vocab_size,
            "max_logprobs": model.max_logprobs,
            "default_sampling_params": model.defaults,
        }

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, object]:
        """tokenizer_config.json as it is read, without the chat template, and the tokens that end an answer."""
        config = {name: value for name, value in model.tokenizer.config.items() if name != "chat_template"}
        return config | {"vocab_size": model.tokenizer.num_tokens, "end_token_ids": sorted(model.end_ids)}

    return router
