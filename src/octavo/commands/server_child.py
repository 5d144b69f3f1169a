"""What a server process makes of what its parent tells it: the text side, the app, and its place among the others."""

from __future__ import annotations

import logging
import pickle
import socket
from collections.abc import Callable

import msgspec
import uvloop
from fastapi import FastAPI

from octavo.commands.serve import ServerStart, allow_many_connections
from octavo.runtime.messages import Ready
from octavo.runtime.shared_link import server_name
from octavo.server.app import build_app
from octavo.server.fleet.collector import FleetCollector, FleetCounters
from octavo.server.fleet.fleet import Fleet
from octavo.server.kept import open_kept
from octavo.server.listen_sockets import Listener
from octavo.server.message.model_formats import ModelFormats
from octavo.server.options import ServerOptions
from octavo.server.processes.child import Child, Ways
from octavo.server.processes.engines import EnginesElsewhere, named_seed
from octavo.server.processes.home import KEEPER, response_ending
from octavo.server.processes.words import ToServer, Unable, Words
from octavo.server.start.engines import fleet_limits, set_adapters
from octavo.server.start.flags import ServeError
from octavo.server.start.served import made_metrics, served_model
from octavo.server.start.text_side import TextSide, found_formats, text_side
from octavo.server.store import MEMORY, StoreError
from octavo.text.frames import receive_frame


def run(link: socket.socket) -> int:
    """Serve until the parent says so; returns the exit code."""
    frame = receive_frame(link)
    if frame is None:
        return 1
    start: ServerStart = pickle.loads(frame)
    logging.basicConfig(
        level=start.options.listen.uvicorn_log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("octavo").setLevel(logging.INFO)
    logging.getLogger("octavo.server.fleet").setLevel(logging.CRITICAL)  # the parent tells of engines, once
    allow_many_connections()
    return 0 if uvloop.run(_serve(start, link)) else 1


async def _serve(start: ServerStart, link: socket.socket) -> bool:
    options = start.options
    words: Words[ToServer] = Words(link, ToServer)
    try:
        text = text_side(options, start.directory)
        ways = _ways(start, text)
    except (ServeError, StoreError) as error:
        words.say(Unable(str(error)))
        await words.open()
        words.close()
        return False
    text.renderer.start()
    num_engines = options.engine.parallel.data_parallel_size
    child = Child(words, start.places, start.number, num_engines, options.listen)
    listener = Listener(socket.socket(fileno=start.listening), "")
    return await child.serve(ways, text.renderer, listener)


def _ways(start: ServerStart, text: TextSide) -> Ways:
    options = start.options
    ending = response_ending(start.number)
    kept = open_kept(_kept_in(start), ending)

    def make_fleet(engines: EnginesElsewhere) -> Fleet:
        seed = named_seed(options.engine.seed, start.number, start.generation)
        fleet = Fleet(engines.all(), engines.start, fleet_limits(options), seed, engines.restarts)
        set_adapters(fleet, options)
        return fleet

    async def prepare() -> ModelFormats:
        return await found_formats(options.text, text)

    def make_app(client: Fleet, ready: Ready, formats: ModelFormats) -> tuple[FastAPI, Callable[[], None]]:
        names = (server_name(start.number, start.generation), ending)
        model = served_model(options, text, ready, formats, names, client.adapters)
        metrics = made_metrics(options, model.name, client, ready, start.places)
        metrics.register(FleetCollector(client, model.name, counts=False))
        app = build_app(model, client, metrics, options.server, start.access, kept)
        counters = FleetCounters(client, model.name, metrics.registry, decides=False)

        def count() -> None:
            counters.take()
            metrics.settle()

        return app, count

    return Ways(make_fleet, prepare, make_app, options.server.max_body_bytes, options.lora.lora_modules)


def _kept_in(start: ServerStart) -> ServerOptions:
    """The options, with what is kept where all processes find it. Batches are process 0's alone."""
    options = start.options.server
    places = start.places
    store = places.responses if options.response_store == MEMORY else options.response_store
    batches = options.batch_dir or places.batches
    return msgspec.structs.replace(options, response_store=store, batch_dir=batches if start.number == KEEPER else None)
