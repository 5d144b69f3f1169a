"""The life of a server of several models: listen, load models as they are asked for, and at SIGTERM finish."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping

import msgspec

from octavo.collector import settled
from octavo.server.access import Access
from octavo.server.kept import open_kept
from octavo.server.lifecycle import DrainingServer, Signals, uvicorn_config
from octavo.server.listen_sockets import Listener, handles
from octavo.server.several.app import PREFIX, build_models_app
from octavo.server.several.models import Models
from octavo.server.several.slot import Slot
from octavo.server.start.flags import ServeOptions


async def serve_models(
    common: ServeOptions, of_models: Mapping[str, ServeOptions], access: Access, listener: Listener
) -> None:
    """Serve until told to stop. of_models: the options of each model; common: the server's. Raises StoreError."""
    server = common.server
    slots: dict[str, Slot] = {}
    stop = Signals()
    try:
        for name, options in of_models.items():
            own = msgspec.structs.replace(server, allowed_origins=(), root_path=f"{server.root_path}{PREFIX}{name}")
            slots[name] = Slot(name, dataclasses.replace(options, server=own), access, open_kept(server))
        models = Models(slots, common.several.max_loaded_models, common.several.idle_unload)
        app = build_models_app(models, server, access)
        idle = asyncio.create_task(models.unload_idle())
        stop.server = DrainingServer(uvicorn_config(app, common.listen), models, models, listener, common.listen)
        settled()
        await stop.server.serve(sockets=handles(listener.socket))
        idle.cancel()
        await models.close()
    finally:
        for slot in slots.values():
            slot.close()
