"""One of several models: what is there of it while it is loaded, how that comes, and how it goes."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from starlette.types import ASGIApp

from octavo.runtime.launch import EngineProcess
from octavo.server.access import Access
from octavo.server.app import build_app
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.collector import FleetCollector
from octavo.server.fleet.fleet import Fleet
from octavo.server.kept import Kept
from octavo.server.lifecycle import EngineStartError
from octavo.server.metrics import Metrics
from octavo.server.served_model import ServedModel
from octavo.server.start.engines import directory_of, fleet_limits, launcher_of, set_adapters
from octavo.server.start.flags import ServeError, ServeOptions, model_of, other_names
from octavo.server.start.served import made_metrics, served_model
from octavo.server.start.text_side import TextSide, preparation, text_side
from octavo.text.chat_template import ChatTemplateError

logger = logging.getLogger(__name__)

UNLOADED = "the model is unloaded"
RETRY_SECONDS = 10.0  # in which a model that can't be loaded isn't tried again
State = Literal["unloaded", "loading", "loaded", "failed"]


class LoadError(RuntimeError):
    """A model that can't be loaded; the message is one line."""


@dataclass(frozen=True)
class Loaded:
    """What is there of a model that is loaded."""

    model: ServedModel
    fleet: Fleet
    text: TextSide
    app: ASGIApp
    collector: FleetCollector


class Slot:
    """A model by its name. Use from one event loop only.

    num_users: HTTP requests that are in its routes. waiting: those that will be once it is loaded. last_used: when the
    last one ended, or it was loaded. is_leaving: it is to be unloaded as soon as nobody uses it, and nobody begins to.
    metrics: kept from one load to the next, so that no counter falls; None before the first.
    """

    def __init__(self, name: str, options: ServeOptions, access: Access, kept: Kept) -> None:
        self.name = name
        self.options = options
        self.own_names = other_names(options)
        self.loaded: Loaded | None = None
        self.metrics: Metrics | None = None
        self.num_users = 0
        self.waiting: list[asyncio.Future[None]] = []
        self.last_used = 0.0
        self.is_leaving = False
        self.is_loading = False
        self.failure: str | None = None
        self.created = int(time.time())
        self._failed_at = 0.0
        self._access = access
        self._kept = kept

    @property
    def state(self) -> State:
        """How it is now."""
        if self.is_loading:
            return "loading"
        return "loaded" if self.loaded is not None else "unloaded" if self.failure is None else "failed"

    @property
    def is_busy(self) -> bool:
        """Whether it has something to do."""
        return self.num_users > 0 or (self.loaded is not None and self.loaded.fleet.num_open > 0)

    @property
    def num_waiting(self) -> int:
        """Those that wait for it, but for clients that have left."""
        return sum(not one.done() for one in self.waiting)

    @property
    def seconds_to_wait(self) -> float:
        """After how long it may be tried to load it again."""
        return 0.0 if self.failure is None else max(0.0, self._failed_at + RETRY_SECONDS - time.monotonic())

    def take_waiting(self) -> list[asyncio.Future[None]]:
        """Those that wait for it, but for clients that have left; they wait no more."""
        waiting = [one for one in self.waiting if not one.done()]
        self.waiting = []
        return waiting

    def card(self) -> dict[str, object]:
        """Its entry in /v1/models: what a served model's has as far as it is known."""
        if self.loaded is not None:
            found = self.loaded.model.card(self.name)
        else:
            found = {"id": self.name, "object": "model", "created": self.created, "owned_by": "octavo"}
            found |= {"root": model_of(self.options.model), "parent": None, "max_model_len": None, "type": "model"}
        return found | {"x_octavo": {"state": self.state, "failure": self.failure}}

    async def load(self) -> None:
        """Load it. Raises LoadError, which is its failure from then on."""
        begin = time.monotonic()
        self.is_loading = True
        self.failure = None
        try:
            self.loaded = await self._load()
        except LoadError as error:
            self.failure = str(error)
            self._failed_at = time.monotonic()
            logger.error("model %r can't be loaded: %s", self.name, error)
            raise
        finally:
            self.is_loading = False
            self.last_used = time.monotonic()
        logger.info("model %r is loaded after %.2f s", self.name, time.monotonic() - begin)

    async def unload(self) -> None:
        """End its engines, and drop what is there of it. May be called again."""
        loaded = self.loaded
        self.loaded = None
        if loaded is None:
            return
        if self.metrics is not None:
            self.metrics.unregister(loaded.collector)
        loaded.text.renderer.stop(UNLOADED)
        if loaded.model.images is not None:
            loaded.model.images.close()
        await loaded.fleet.close()
        logger.info("model %r is unloaded", self.name)

    def close(self) -> None:
        """Drop what is kept of it between two loads."""
        self._kept.close()

    async def _load(self) -> Loaded:
        options = self.options
        engines: list[EngineProcess] = []
        text: TextSide | None = None
        fleet: Fleet | None = None
        try:
            directory = await asyncio.to_thread(directory_of, model_of(options.model), options.model)
            launcher = launcher_of(options, directory)
            engines = launcher.start_all()  # they load while the text side is read
            text = await asyncio.to_thread(text_side, options, directory)
            text.renderer.start()
            fleet = Fleet(engines, launcher.start, fleet_limits(options), options.engine.seed)
            set_adapters(fleet, options)
            formats = await preparation(options.text, text, nullcontext, options.lora.lora_modules)(fleet)
            ready = await fleet.ready()
            model = served_model(options, text, ready, formats, adapters=fleet.adapters)
            if self.metrics is None:
                self.metrics = made_metrics(options, model.name, fleet, ready)
            collector = FleetCollector(fleet, model.name)
            app = build_app(model, fleet, self.metrics, options.server, self._access, self._kept)
        except BaseException as error:
            if fleet is not None:
                await fleet.close()
            if text is not None:
                text.renderer.stop(UNLOADED)
            for engine in engines:
                await asyncio.to_thread(engine.close)
            if isinstance(error, ServeError | EngineDeadError | EngineStartError | ChatTemplateError | OSError):
                raise LoadError(str(error)) from None
            raise
        self.metrics.register(collector)
        for index in range(len(engines)):
            self.metrics.restart(index)  # its totals begin with nothing
        fleet.on_step = self.metrics.step
        fleet.on_restart = self.metrics.restart
        return Loaded(model, fleet, text, app, collector)
