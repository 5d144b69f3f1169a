"""An ASGI application behind octavo's own HTTP protocol, on a real socket of this process."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from octavo.server.connection import Connection, Door


@asynccontextmanager
async def connected(
    app: ASGIApp, door: Door | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    protocol: Any = functools.partial(Connection, door=door)
    config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None, port=0)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname(), limit=1 << 20)
    try:
        yield reader, writer
    finally:
        writer.close()
        await server.shutdown()
