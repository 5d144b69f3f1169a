"""/v1/files and /v1/batches: OpenAI's way to ask for much that isn't urgent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import Field

from octavo.server.batches import Batches
from octavo.server.dialects.fields import Integer, Strict, Text
from octavo.server.dialects.responses import page_of
from octavo.server.dialects.responses_request import Metadata
from octavo.server.encoding import JsonResponse, encode_json
from octavo.server.errors import RESPONSES, bad_request, only_as
from octavo.server.files import FileInfo, Files
from octavo.server.forms import file_of, received_form
from octavo.server.service import owner_of
from octavo.server.strict_json import StrictRoute

PIECE_BYTES = 1 << 20
LEAST_SECONDS = 3_600  # that a file may be kept for, as OpenAI has it
MOST_SECONDS = 2_592_000
KNOWN_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")

Json = dict[str, Any]
Limit = Annotated[int, Query(ge=1, le=10_000)]


class OutputExpiry(Strict):
    """How long the files that a batch makes are kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[Integer, Field(ge=LEAST_SECONDS, le=MOST_SECONDS)]


class BatchRequest(Strict):
    """POST /v1/batches."""

    input_file_id: Text
    endpoint: Text
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None


def routes(files: Files, batches: Batches, endpoints: Callable[[], set[str]]) -> APIRouter:
    """/v1/files and /v1/batches. endpoints: the routes that a batch may ask."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    _add_file_routes(router, files)

    @router.post("/v1/batches")
    async def create(body: BatchRequest, http: Request) -> Response:
        """Answer a file of requests when the engine has room that nobody else needs."""
        known = endpoints()
        if body.endpoint not in known:
            raise bad_request(f"endpoint: batches can ask {', '.join(sorted(known))}", "endpoint")
        keep = body.output_expires_after
        seconds = None if keep is None else keep.seconds
        batch = batches.create(owner_of(http), body.endpoint, body.input_file_id, body.metadata or {}, seconds)
        return _json(batch.as_json())

    @router.get("/v1/batches")
    async def all_batches(http: Request, limit: Limit = 20, after: str | None = None) -> Response:
        """All batches, the newest first."""
        return _json(page_of([batch.as_json() for batch in batches.all_of(owner_of(http))], limit, after))

    @router.get("/v1/batches/{batch_id}")
    async def one_batch(batch_id: str, http: Request) -> Response:
        """How far a batch is."""
        return _json(batches.get(batch_id, owner_of(http)).as_json())

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str, http: Request) -> Response:
        """End a batch; what it has answered so far is kept."""
        batch = batches.get(batch_id, owner_of(http))
        batches.cancel(batch)
        return _json(batch.as_json())

    return router


def _add_file_routes(router: APIRouter, files: Files) -> None:
    @router.post("/v1/files")
    async def upload(http: Request) -> Response:
        """Keep a file: multipart, with the fields file and purpose."""
        return _json((await _uploaded(http, files)).as_json())

    @router.get("/v1/files")
    async def all_files(
        http: Request,
        limit: Limit = 10_000,
        after: str | None = None,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
        purpose: str | None = None,
    ) -> Response:
        """All files, the newest first."""
        found = [info.as_json() for info in files.all_of(owner_of(http), purpose)]
        return _json(page_of(found if order == "asc" else found[::-1], limit, after))

    @router.get("/v1/files/{file_id}")
    async def one_file(file_id: str, http: Request) -> Response:
        """What is known of a file."""
        return _json(files.get(file_id, owner_of(http)).as_json())

    @router.get("/v1/files/{file_id}/content", response_class=Response, responses=only_as("application/octet-stream"))
    async def content(file_id: str, http: Request) -> Response:
        """A file's content."""
        info = files.get(file_id, owner_of(http))
        return FileResponse(files.path(file_id), media_type="application/octet-stream", filename=info.filename)

    @router.delete("/v1/files/{file_id}")
    async def delete(file_id: str, http: Request) -> Response:
        """Forget a file."""
        files.get(file_id, owner_of(http))
        files.delete(file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})


def _json(value: Json) -> Response:
    return JsonResponse(encode_json(value))


async def _uploaded(http: Request, files: Files) -> FileInfo:
    """Receive a file. Raises ApiError."""
    room = files.room()
    too_large = f"the file is larger than what this server has room for, {room} bytes (--batch-size)"
    form = await received_form(http, room, too_large, KNOWN_FIELDS)
    try:
        file = file_of(form)
        if form.get("purpose") != "batch":
            raise bad_request("purpose: 'batch' is the only one that files are for here", "purpose")
        seconds = _seconds(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
        file_id, path = files.new_path()
        with path.open("wb") as kept:
            while piece := await file.read(PIECE_BYTES):
                await asyncio.to_thread(kept.write, piece)
        name = (file.filename or "")[:256] or file_id
        return files.add(file_id, owner_of(http), name, "batch", seconds)
    finally:
        await form.close()


def _seconds(anchor: object, seconds: object) -> int | None:
    """For how long a file is kept. Raises ApiError."""
    if anchor is None and seconds is None:
        return None
    number = int(seconds) if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() else 0
    if anchor != "created_at" or not LEAST_SECONDS <= number <= MOST_SECONDS:
        raise bad_request(
            f"expires_after: anchor must be 'created_at', and seconds from {LEAST_SECONDS} to {MOST_SECONDS}",
            "expires_after",
        )
    return number
