"""Routes for those who operate a server: how it is, what it is doing, and its prefix cache."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field

from octavo.runtime.messages import StartupReport
from octavo.server.access import Access
from octavo.server.dialects.fields import Strict, Text
from octavo.server.dialects.thinking import can_think
from octavo.server.errors import ANY_ERROR, RESPONSES, TEXT, ApiError, ErrorResponse
from octavo.server.fleet.draining import drain
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.member import Member
from octavo.server.metrics import CONTENT_TYPE, Metrics
from octavo.server.served_model import ServedModel
from octavo.server.service import Service, owner_of
from octavo.server.strict_json import StrictRoute
from octavo.server.web.page import report_of
from octavo.version import VERSION

HEALTH_SECONDS = 30.0  # one step of a large model on a slow machine may take seconds; nothing healthy takes this

ID_PREFIXES = ("chatcmpl-", "cmpl-", "msg_")  # of an answer's id, in front of what its request is called

DRAIN_RESPONSES: dict[int | str, dict[str, Any]] = {
    403: {"model": ErrorResponse, "description": "The server has no API key"},
    404: {"model": ErrorResponse, "description": "No such engine"},
    503: RESPONSES[503],
}

OpenRequests = Literal["abort", "wait", "keep"]


class PauseGeneration(Strict):
    """SGLang's body of /pause_generation; `retract` is as good as in_place, as no sequence must be moved."""

    mode: Literal["abort", "in_place", "retract"] = "abort"


class AbortRequests(Strict):
    """vLLM's body of /abort_requests."""

    request_ids: Annotated[list[Text], Field(min_length=1, max_length=4096, fail_fast=True)]


class ContinueGeneration(Strict):
    """SGLang's body of /continue_generation."""


def no_other_page(http: Request) -> None:
    """Refuse a POST that a web page of another origin sends: a browser lets any page send one without a body."""
    origin = http.headers.get("origin")
    if http.method == "POST" and origin is not None and origin.partition("://")[2] != http.headers.get("host"):
        raise ApiError(403, f"POST {http.url.path} is not for web pages of other origins ({origin[:80]!r})")


def engine_routes(client: Fleet, counted: Metrics, access: Access) -> APIRouter:
    """/health, /ping, /metrics, /load, /get_load, /reset_prefix_cache, /engines/{index}/drain."""
    router = APIRouter(dependencies=[Depends(no_other_page)], responses=ANY_ERROR)

    @router.get("/health", responses={503: RESPONSES[503]}, response_class=Response)
    async def health() -> Response:
        """200 when an engine itself answers; 503 when none is up, all hang, or the server is shutting down."""
        if not await client.ping(HEALTH_SECONDS):
            reason = client.problem or f"the engine did not answer within {HEALTH_SECONDS:.0f} s"
            raise ApiError(503, reason)
        return Response(status_code=200)

    @router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
    async def ping() -> Response:
        """/health under SageMaker's name."""
        return await health()

    @router.get("/metrics", response_class=Response, responses=TEXT)
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(counted.page(), media_type=CONTENT_TYPE)

    @router.get("/load")
    async def load() -> dict[str, int]:
        """How many answers are open, in the engine or in its queue (vLLM's name)."""
        return {"server_load": client.num_open_everywhere}

    @router.get("/get_load")
    async def get_load() -> list[dict[str, int]]:
        """SGLang's /load: of each engine the open answers, those of them that wait, and tokens in its KV cache."""
        return [_load_of(member) for member in client.members]

    @router.post("/reset_prefix_cache", response_class=Response)
    async def reset_prefix_cache() -> Response:
        """Forget all cached prefixes that no running request holds."""
        _check(client)
        client.reset_prefix_cache()
        return Response(status_code=200)

    _add_drain(router, client, access)
    return router


def _add_drain(router: APIRouter, client: Fleet, access: Access) -> None:
    @router.post("/engines/{index}/drain", responses=DRAIN_RESPONSES)
    async def drain_engine(index: int) -> dict[str, object]:
        """Let an engine finish what it has, while others take what comes, and replace its process by a new one."""
        if not access.keys:
            raise ApiError(403, "only who has an API key may drain an engine, and this server has none (--api-key)")
        _check(client)
        if not 0 <= index < len(client.members):
            raise ApiError(404, f"there is no engine {index}: they are 0 to {len(client.members) - 1}")
        await drain(client, index)
        if not client.members[index].is_up:
            raise ApiError(503, client.members[index].trouble)
        return {"engine": index, "status": "replaced"}


def _load_of(member: Member) -> dict[str, int]:
    stats = member.stats
    capacity = member.ready.num_blocks * member.ready.block_size
    return {
        "dp_rank": member.index,
        "num_reqs": member.num_open,
        "num_waiting_reqs": 0 if stats is None else stats.num_waiting,
        "num_tokens": 0 if stats is None else round(stats.kv_cache_usage * capacity),
    }


def abort_routes(service: Service) -> APIRouter:
    """/abort_requests."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)

    @router.post("/abort_requests", response_class=Response)
    async def abort_requests(body: AbortRequests, http: Request) -> Response:
        """End requests of the same API key with the finish reason `abort`, by their ids or their answers' ids."""
        names = {given.removeprefix(prefix) for given in body.request_ids for prefix in ("", *ID_PREFIXES)}
        service.abort_all_of(owner_of(http), names)
        return Response(status_code=200)

    return router


def pause_routes(client: Fleet) -> APIRouter:
    """/pause, /resume, /is_paused, and SGLang's names for them."""
    router = APIRouter(dependencies=[Depends(no_other_page)], responses=ANY_ERROR)

    @router.post("/pause")
    async def pause(mode: OpenRequests = "abort", clear_cache: bool = True) -> dict[str, str]:
        """Begin no request until /resume. Open ones end now (abort), are waited for (wait), or stand still (keep)."""
        _check(client)
        await client.pause(mode)
        if clear_cache and mode != "keep":
            client.reset_prefix_cache()
        return {"status": "paused"}

    @router.post("/resume")
    async def resume() -> dict[str, str]:
        """Go on."""
        _check(client)
        client.resume()
        return {"status": "resumed"}

    @router.get("/is_paused")
    async def is_paused() -> dict[str, bool]:
        """Whether the server is paused."""
        return {"is_paused": client.is_paused}

    @router.post("/pause_generation")
    async def pause_generation(body: PauseGeneration | None = None) -> dict[str, str]:
        """SGLang's /pause: abort, or let open requests stand still (in_place, retract)."""
        _check(client)
        await client.pause("abort" if body is None or body.mode == "abort" else "keep")
        return {"message": "Generation paused successfully.", "status": "ok"}

    @router.post("/continue_generation")
    async def continue_generation(_: ContinueGeneration | None = None) -> dict[str, str]:
        """SGLang's /resume."""
        _check(client)
        client.resume()
        return {"message": "Generation continued successfully.", "status": "ok"}

    return router


def _check(client: Fleet) -> None:
    if client.refusal is not None:
        raise ApiError(503, client.refusal)


def model_routes(model: ServedModel) -> APIRouter:
    """/version, /server_info, /tokenizer_info."""
    router = APIRouter(responses=ANY_ERROR)

    @router.get("/version")
    async def version() -> dict[str, str]:
        """octavo's version."""
        return {"version": VERSION}

    @router.get("/server_info")
    async def server_info() -> dict[str, object]:
        """What is served, within which limits, and what the engine has loaded: its kernels, and bytes of memory."""
        found = model.formats.found
        return {
            "version": VERSION,
            "models": list(model.names),
            "max_model_len": model.max_model_len,
            "vocab_size": model.vocab_size,
            "max_logprobs": model.max_logprobs,
            "default_sampling_params": model.defaults,
            "can_chat": model.renderer.template.has_default,
            "tool_calls": None if found.tools is None else found.tools.kind,
            "reasoning": can_think(model),
            "quantization_report": report_of(model.directory) is not None,
            "engine": None if model.report is None else _engine(model.report),
        }

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, object]:
        """tokenizer_config.json as it is read, without the chat template, and the tokens that end an answer."""
        config = {name: value for name, value in model.tokenizer.config.items() if name != "chat_template"}
        return config | {"vocab_size": model.tokenizer.num_tokens, "end_token_ids": sorted(model.end_ids)}

    return router


def _engine(report: StartupReport) -> dict[str, object]:
    """What the table at start says; of several engines, the first one's."""
    return {
        "architecture": report.architecture,
        "dtype": report.dtype,
        "device": report.device,
        "kv_cache_dtype": report.kv_cache_dtype,
        "weight_bytes": report.weight_bytes,
        "kv_cache_bytes": report.kv_cache_bytes,
        "layers": [dict(zip(("layers", "scheme", "body"), row, strict=True)) for row in report.layers],
        "seconds": report.seconds,
        "notes": report.notes,
        "ranks": report.ranks,
    }
