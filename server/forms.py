"""Multipart forms with a file, received within limits; the file lies on disk as soon as it is large."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from octavo.server.bodies import BODY_SECONDS
from octavo.server.errors import ApiError, bad_request

MAX_FIELDS = 32
BESIDE = 1 << 16  # bytes of a form that aren't its file's


async def received_form(http: Request, most_bytes: int, too_large: str, fields: Collection[str]) -> FormData:
    """A request's form, whose file has `most_bytes` at most; to be closed. Raises ApiError.

    too_large: what is said of a larger one. fields: those that it may have.
    """
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise bad_request(f"the body must be multipart/form-data, with the fields {', '.join(fields)}")
    pieces = _bounded(http, most_bytes + BESIDE, too_large)
    try:
        form = await MultiPartParser(http.headers, pieces, max_files=1, max_fields=MAX_FIELDS).parse()
    except (MultiPartException, UnicodeError) as error:
        raise bad_request(f"the body is no multipart form: {error}") from None
    unknown = next((name for name in form if name not in fields), None)
    if unknown is not None:
        await form.close()
        raise bad_request(f"{unknown[:80]}: octavo does not support this field", unknown[:80])
    return form


def file_of(form: FormData) -> UploadFile:
    """The field `file`. Raises ApiError."""
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise bad_request("file: this field is missing, or has no file name", "file")
    return file


async def _bounded(http: Request, most: int, too_large: str) -> AsyncGenerator[bytes, None]:
    """The body's pieces. Raises ApiError where they are more than that, or don't come."""
    size = 0
    pieces = http.stream()
    while True:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, "the body did not come") from None
        size += len(piece)
        if size > most:
            raise ApiError(413, too_large)
        yield piece
