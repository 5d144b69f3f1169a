"""Loading and unloading of LoRA adapters while the server runs: vLLM's routes, and SGLang's with answers of their own.

A path is one of the server's file system, so these are open only with --enable-runtime-lora.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from octavo.quant.adapter_files import AdapterError
from octavo.server.dialects.fields import Flag, Strict, Text
from octavo.server.encoding import encode_json
from octavo.server.errors import RESPONSES, TEXT, ApiError, ErrorResponse, bad_request
from octavo.server.fleet.adapters import AdapterNames
from octavo.server.hints import Hint
from octavo.server.lora_options import LoraModule
from octavo.server.operation import no_other_page
from octavo.server.strict_json import StrictRoute

Name = Annotated[Text, Field(min_length=1, max_length=512)]
NOT_OPEN: dict[str, Any] = {"model": ErrorResponse, "description": "Adapters are loaded at start alone"}
Directory = Annotated[Text, Field(min_length=1, max_length=4096)]


class LoadAdapterRequest(Strict):
    """vLLM's body of /v1/load_lora_adapter. load_inplace: a name that is served is given to these files."""

    lora_name: Name
    lora_path: Directory
    load_inplace: Flag = False
    is_3d_lora_weight: Literal[False] | None = None


class UnloadAdapterRequest(Strict):
    """vLLM's body of /v1/unload_lora_adapter. lora_int_id: vLLM's own number of it, which says nothing here."""

    lora_name: Name
    lora_int_id: Hint = None


class NativeLoadRequest(Strict):
    """SGLang's body of /load_lora_adapter. pinned: no adapter can be promised a slot for ever."""

    lora_name: Name
    lora_path: Directory
    pinned: Literal[False] | None = None
    lora_id: None = None


class NativeUnloadRequest(Strict):
    """SGLang's body of /unload_lora_adapter."""

    lora_name: Name
    lora_id: None = None


def routes(adapters: AdapterNames) -> APIRouter:
    """/v1/load_lora_adapter, /v1/unload_lora_adapter, /load_lora_adapter, /unload_lora_adapter."""

    def check(http: Request) -> None:
        no_other_page(http)
        if not adapters.is_open:
            raise ApiError(403, "adapters are loaded at start here (--lora-modules); --enable-runtime-lora allows more")

    router = APIRouter(route_class=StrictRoute, responses=RESPONSES | {403: NOT_OPEN})

    @router.post("/v1/load_lora_adapter", response_class=Response, responses=TEXT)
    async def load_lora_adapter(body: LoadAdapterRequest, http: Request) -> Response:
        """Serve an adapter under a name."""
        check(http)
        try:
            await adapters.load(LoraModule(body.lora_name, body.lora_path), in_place=bool(body.load_inplace))
        except AdapterError as error:
            raise bad_request(str(error), "lora_path") from None
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    @router.post("/v1/unload_lora_adapter", response_class=Response, responses=TEXT)
    async def unload_lora_adapter(body: UnloadAdapterRequest, http: Request) -> Response:
        """Serve an adapter no more; requests under way go on with it."""
        check(http)
        try:
            await adapters.unload(body.lora_name)
        except AdapterError as error:
            raise ApiError(404, str(error), param="lora_name") from None
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")

    @router.post("/load_lora_adapter", response_class=Response)
    async def native_load(body: NativeLoadRequest, http: Request) -> Response:
        """The same as SGLang says it."""
        check(http)
        try:
            await adapters.load(LoraModule(body.lora_name, body.lora_path))
        except AdapterError as error:
            return _told(adapters, str(error))
        return _told(adapters)

    @router.post("/unload_lora_adapter", response_class=Response)
    async def native_unload(body: NativeUnloadRequest, http: Request) -> Response:
        """The same as SGLang says it."""
        check(http)
        try:
            await adapters.unload(body.lora_name)
        except AdapterError as error:
            return _told(adapters, str(error))
        return _told(adapters)

    return router


def _told(adapters: AdapterNames, error: str = "") -> Response:
    loaded = {module.name: module.path for module in adapters.modules}
    content = {"success": not error, "error_message": error, "loaded_adapters": loaded}
    return Response(encode_json(content), status_code=400 if error else 200, media_type="application/json")
