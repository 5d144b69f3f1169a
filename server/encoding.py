"""Answers as JSON. A large answer is made and encoded piece by piece, in turns with the work for other requests.

What may be long in an answer is a generator, which stands for an array: log-probabilities become objects of JSON only
when they are encoded. As objects at once, 4 million of them would take gigabytes and hold up the event loop for
seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import GeneratorType
from typing import Any

import msgspec
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

TURN_SECONDS = 0.005  # of encoding, after which others have their turn
PIECE_BYTES = 1 << 18  # of an answer that are joined and sent at once


def _array(value: Any) -> list[Any]:
    """A generator as msgspec encodes it, which asks here for types that it doesn't know."""
    if isinstance(value, GeneratorType):
        return list(value)
    raise NotImplementedError(f"{type(value).__name__} is no part of an answer")


encode_json = msgspec.json.Encoder(enc_hook=_array).encode


def json_pieces(value: Any) -> Iterator[bytes]:
    """The bytes of `encode_json` in pieces, cut within generators, which are used up."""
    if isinstance(value, GeneratorType):
        before = b"["
        for item in value:
            yield before
            yield from json_pieces(item)
            before = b","
        yield b"]" if before == b"," else b"[]"
    elif isinstance(value, dict) and _has_generators(value):
        before = b"{"
        for key, member in value.items():
            yield before + encode_json(key) + b":"
            yield from json_pieces(member)
            before = b","
        yield b"}"
    else:
        yield encode_json(value)


def _has_generators(value: Any) -> bool:
    return isinstance(value, GeneratorType) or (isinstance(value, dict) and any(map(_has_generators, value.values())))


async def encode_in_turns(value: Any) -> list[bytes]:
    """`encode_json` of a value of any size, in pieces, without holding up the event loop: joining them would do so."""
    joined: list[bytes] = []
    pieces: list[bytes] = []
    size = 0
    end = time.monotonic() + TURN_SECONDS
    for piece in json_pieces(value):
        pieces.append(piece)
        size += len(piece)
        if size > PIECE_BYTES:
            joined.append(b"".join(pieces))
            pieces.clear()
            size = 0
        if time.monotonic() > end:
            await asyncio.sleep(0)
            end = time.monotonic() + TURN_SECONDS
    return [*joined, b"".join(pieces)]


class JsonResponse(Response):
    """JSON that is encoded already, in pieces: each is sent once the client has taken most of the one before."""

    media_type = "application/json"

    def __init__(self, *pieces: bytes) -> None:
        super().__init__(headers={"content-length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        *first, last = self._pieces
        for piece in first:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": last})
