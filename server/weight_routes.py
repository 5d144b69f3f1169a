"""Routes that give a server's engines new weights: SGLang's, and vLLM's for reinforcement learning.

New weights come from a directory of the server's file system, so these are open only with --enable-weight-updates. What
would bring tensors themselves is refused: SGLang's are pickles, which can run any code, and NCCL's and CUDA's handles
need the trainer's GPU.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field

from octavo.server.dialects.fields import Flag, Strict, Text
from octavo.server.encoding import encode_json
from octavo.server.errors import CLOSED, RESPONSES, ApiError, bad_request
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.renewal import UpdateError
from octavo.server.hints import Hint
from octavo.server.operation import no_other_page
from octavo.server.served_model import WeightVersion

Directory = Annotated[Text, Field(min_length=1, max_length=4096)]
Version = Annotated[Text, Field(min_length=1, max_length=256)]
TENSORS = (
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/update_weights_from_ipc",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/get_weights_by_name",
    "/start_draft_weight_update",
)
FROM_DISK = "weights come from the disk: save a checkpoint, and POST /update_weights_from_disk names its directory"


class Updates(Protocol):
    """Who updates weights."""

    version: WeightVersion

    async def update(self, path: str, version: str | None = None, *, aborts: bool = False) -> int:
        """Serve the checkpoint in this directory; returns how many requests go on with it. Raises UpdateError."""


class UpdateFromDisk(Strict):
    """SGLang's body of /update_weights_from_disk. Prefixes are always forgotten, and answers go on meanwhile."""

    model_path: Directory
    load_format: Literal["auto", "safetensors"] | None = None
    abort_all_requests: Flag = False
    weight_version: Version | None = None
    flush_cache: Literal[True] | None = None
    is_async: Hint = None
    torch_empty_cache: Hint = None
    keep_pause: Hint = None
    recapture_cuda_graph: Hint = None
    token_step: Hint = None
    manifest: None = None


class NewVersion(Strict):
    """SGLang's body of /update_weight_version."""

    new_version: Version
    abort_all_requests: Literal[False] | None = None


class TransferInit(Strict):
    """What vLLM's trainers say of how weights will come: here from the disk."""

    backend: Literal["disk"] = "disk"


class InitTransfer(Strict):
    """vLLM's body of /init_weight_transfer_engine."""

    init_info: TransferInit


class StartUpdate(Strict):
    """vLLM's body of /start_weight_update."""

    is_checkpoint_format: Literal[True] | None = None


class UpdateInfo(Strict):
    """Where the weights are."""

    model_path: Directory
    weight_version: Version | None = None


class UpdateWeights(Strict):
    """vLLM's body of /update_weights."""

    update_info: UpdateInfo


class FinishUpdate(Strict):
    """vLLM's body of /finish_weight_update."""

    weight_version: Version | None = None


def routes(client: Fleet, found: Updates | None) -> APIRouter:
    """SGLang's routes and vLLM's. found: None: they are not open."""
    router = APIRouter(dependencies=[Depends(no_other_page)], responses=RESPONSES | CLOSED)
    _add_sglang_s(router, found)
    _add_vllm_s(router, found)

    @router.get("/get_world_size")
    async def get_world_size(include_dp: bool = True) -> dict[str, int]:
        """How many ranks there are, of all engines or of one (vLLM's)."""
        counts = [max(1, len(member.ready.report.ranks)) for member in client.members]
        return {"world_size": sum(counts) if include_dp else counts[0]}

    for path in TENSORS:
        router.add_api_route(path, _refuse_tensors, methods=["POST"], include_in_schema=False)
    return router


async def _refuse_tensors(http: Request) -> Response:
    raise bad_request(f"{http.url.path} is not supported: {FROM_DISK}")


def _opened(found: Updates | None) -> Updates:
    if found is None:
        raise ApiError(403, "this server's weights are those of its start; --enable-weight-updates allows others")
    return found


def _add_sglang_s(router: APIRouter, found: Updates | None) -> None:
    @router.post("/update_weights_from_disk", response_class=Response)
    async def update_weights_from_disk(body: UpdateFromDisk) -> Response:
        """Serve the weights of another checkpoint of the same model; whatever is wrong with it, the old ones go on."""
        updates = _opened(found)
        content: dict[str, object]
        try:
            aborts = body.abort_all_requests
            count = await updates.update(body.model_path, body.weight_version, aborts=bool(aborts))
            content = {"success": True, "message": "the new weights are served", "num_paused_requests": count}
        except UpdateError as error:
            content = {"success": False, "message": str(error), "num_paused_requests": 0}
        status = 200 if content["success"] else 400
        return Response(encode_json(content), status_code=status, media_type="application/json")

    @router.post("/update_weight_version")
    async def update_weight_version(body: NewVersion) -> dict[str, object]:
        """Let answers call the weights so."""
        _opened(found).version.name = body.new_version
        return {"success": True, "message": f"the weights are called {body.new_version}"}


def _add_vllm_s(router: APIRouter, found: Updates | None) -> None:
    @router.post("/init_weight_transfer_engine")
    async def init_weight_transfer_engine(body: InitTransfer) -> dict[str, str]:
        """Nothing to be done: weights come from the disk."""
        _opened(found)
        return {"message": f"Weight transfer initialized: {body.init_info.backend}"}

    @router.post("/start_weight_update")
    async def start_weight_update(_: StartUpdate | None = None) -> dict[str, str]:
        """Nothing to be done: /update_weights does it at once."""
        _opened(found)
        return {"message": "Weight update started"}

    @router.post("/update_weights")
    async def update_weights(body: UpdateWeights) -> dict[str, object]:
        """Serve the weights of another checkpoint of the same model; whatever is wrong with it, the old ones go on."""
        updates = _opened(found)
        try:
            count = await updates.update(body.update_info.model_path, body.update_info.weight_version)
        except UpdateError as error:
            raise bad_request(str(error), "update_info.model_path") from None
        return {"message": "Weights updated", "weight_version": updates.version.name, "num_kept_requests": count}

    @router.post("/finish_weight_update")
    async def finish_weight_update(body: FinishUpdate | None = None) -> dict[str, str]:
        """Let answers call the weights so."""
        updates = _opened(found)
        if body is not None and body.weight_version is not None:
            updates.version.name = body.weight_version
        return {"message": "Weight update finished", "weight_version": updates.version.name}
