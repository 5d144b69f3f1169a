"""Serve a checkpoint behind an OpenAI-compatible HTTP server.

Flags are vLLM's; SGLang's names for them are accepted too.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.collector import uncollected
from octavo.commands.failure import one_line
from octavo.server.access import Access, api_keys, default_hosts
from octavo.server.several_options import SeveralOptions
from octavo.server.start.arguments import ArgumentsError, of_models, own_arguments
from octavo.server.start.flags import (
    OptionsError,
    ServeError,
    ServeOptions,
    check_upkeep,
    configure,
    engine_config,
    model_of,
    read_options,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from octavo.runtime.launch import EngineProcess, Launcher
    from octavo.runtime.messages import Ready
    from octavo.server.fleet.collector import FleetCounters
    from octavo.server.fleet.fleet import Fleet
    from octavo.server.listen_sockets import Listener
    from octavo.server.message.model_formats import ModelFormats
    from octavo.server.metrics import Metrics
    from octavo.server.options import ListenOptions
    from octavo.server.processes.places import Places
    from octavo.server.start.text_side import TextSide

__all__ = ["configure", "own_words", "run"]

PROG = "octavo serve"
SERVER_PROGRAM = ("-m", "octavo.commands.server_process")


def own_words(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line as the parser takes it: with what --config says, and without flags that change nothing."""
    try:
        words, notes = own_arguments(arguments, parser)
        several, more = of_models(arguments, parser)
    except ArgumentsError as error:
        parser.exit(2, f"{parser.prog}: {one_line(error)}\n")
    models = None
    if several is not None:
        models = {name: parser.parse_intermixed_args(own) for name, own in several.items()}
    parser.set_defaults(notes=notes + more, models=models)
    return words


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code: 1 when it could not start, or the engine died."""
    begun = time.monotonic()
    for note in args.notes:
        print(f"{PROG}: {note}", file=sys.stderr)
    try:
        options = read_options(args)
        models = None if args.models is None else {name: read_options(each) for name, each in args.models.items()}
    except OptionsError as error:
        print(f"{PROG}: {one_line(error)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=options.listen.uvicorn_log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("octavo").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server listens; what is begun is cleared up
    try:
        alive = _serve(options, begun) if models is None else _serve_models(options, models)
    except (ServeError, OSError) as error:
        print(f"{PROG}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0 if alive else 1


def _serve(options: ServeOptions, begun: float) -> bool:
    from octavo.server.start.engines import directory_of

    model = model_of(options.model)
    if options.several != SeveralOptions():
        raise ServeError("--max-loaded-models and --idle-unload are about the models of a --config file; there is one")
    if options.engine.parallel.headless:
        _compute_for_another_machine(options, directory_of(model, options.model))
        return True
    _check_tls(options.listen)
    _check_processes(options)
    check_upkeep(options)
    access = access_of(options)
    with _bound(options.listen) as listener:
        directory = directory_of(model, options.model)
        serve = _serve_alone if options.listen.api_server_count == 1 else _serve_with_processes
        return serve(options, directory, access, listener, begun)


def _serve_models(options: ServeOptions, models: Mapping[str, ServeOptions]) -> bool:
    """Several models, which are loaded as they are asked for."""
    from octavo.commands.serve_several import check_several, serve_several

    check_several(options, models)
    _check_tls(options.listen)
    access = access_of(options)
    with _bound(options.listen) as listener:
        return serve_several(options, models, access, listener)


def _check_processes(options: ServeOptions) -> None:
    """An engine on another machine has a connection to one process."""
    count = options.listen.api_server_count
    parallel = options.engine.parallel
    if count > 1 and len(parallel.local_engines) < parallel.data_parallel_size:
        local = f"--data-parallel-size-local {len(parallel.local_engines)} of {parallel.data_parallel_size}"
        where = "Ray" if parallel.is_on_ray else local
        raise ServeError(f"--api-server-count {count} with engines elsewhere ({where}): --api-server-count 1 works")


def _serve_alone(options: ServeOptions, directory: Path, access: Access, listener: Listener, begun: float) -> bool:
    """One process serves HTTP, and has the engines."""
    from octavo.server.start.engines import launcher_of

    engines: list[EngineProcess] = []
    try:
        launcher = launcher_of(options, directory)
        engines = launcher.start_all()  # they load while the server's own modules are imported
        allow_many_connections()
        with uncollected():
            import uvloop

            from octavo.commands.serve_loading import loading_shown
            from octavo.server.lifecycle import serve
            from octavo.server.start.text_side import preparation, text_side

            text = text_side(options, directory)
            text.renderer.start()
            prepare = preparation(options.text, text, partial(loading_shown, engines), options.lora.lora_modules)
            make_app = _app_maker(options, text, begun, access)
            open_fleet = _fleet_opener(options, engines, launcher)
        with _start_errors(options, directory):
            return uvloop.run(serve(open_fleet, text.renderer, prepare, make_app, listener, options.listen))
    finally:
        for engine in engines:
            engine.close()


def _serve_with_processes(
    options: ServeOptions, directory: Path, access: Access, listener: Listener, begun: float
) -> bool:
    """Several processes serve HTTP, and this one has them and the engines."""
    from octavo.runtime.launch import SocketDirectory
    from octavo.server.processes.launch import ServerProcess, ServerStartError, start_server_process
    from octavo.server.processes.places import MULTIPROCESS_VARIABLE, Places
    from octavo.server.start.engines import launcher_of
    from octavo.server.store import StoreError, prepare_shared

    count = options.listen.api_server_count
    shared = SocketDirectory()
    places = Places(shared.path, count)
    places.metrics.mkdir()
    os.environ[MULTIPROCESS_VARIABLE] = str(places.metrics)  # before prometheus_client is imported, here and there

    def start(number: int, generation: int) -> ServerProcess:
        told = ServerStart(options, directory, access, places, number, generation, listener.socket.fileno())
        return start_server_process(SERVER_PROGRAM, pickle.dumps(told), listener.socket)

    engines: list[EngineProcess] = []
    servers: list[ServerProcess] = []
    try:
        launcher = launcher_of(options, directory, places)
        engines = launcher.start_all()
        kept = options.server  # the end of this process closes what the next line returns
        prepare_shared(kept.response_store, kept.response_store_size, kept.response_store_ttl)
        servers = [start(number, 0) for number in range(count)]
        with uncollected():
            import uvloop

            from octavo.commands.serve_loading import loading_shown
            from octavo.server.processes.parent import Parent, serve_with_processes
            from octavo.server.start.text_side import preparation, text_side

            text = text_side(options, directory)
            text.renderer.start()
            prepare = preparation(options.text, text, partial(loading_shown, engines), options.lora.lora_modules)
            report = _reporter(options, text, begun, places)
            open_fleet = _fleet_opener(options, engines, launcher)
            make_parent = partial(Parent, processes=servers, start=start, places=places, options=options.listen)
        with _start_errors(options, directory):
            return uvloop.run(
                serve_with_processes(open_fleet, make_parent, text.renderer, prepare, report, listener, options.listen)
            )
    except (StoreError, ServerStartError) as error:
        raise ServeError(str(error)) from None
    finally:
        for server in servers:
            server.kill()
        for engine in engines:
            engine.close()
        shared.remove()


@dataclass(frozen=True)
class ServerStart:
    """What one of several server processes is told. listening: the number of the socket that all share."""

    options: ServeOptions
    directory: Path
    access: Access
    places: Places
    number: int
    generation: int
    listening: int


@contextmanager
def _start_errors(options: ServeOptions, directory: Path) -> Iterator[None]:
    """What keeps a server from starting, as a line for the user."""
    from octavo.server.lifecycle import EngineStartError
    from octavo.server.listen_sockets import BindError
    from octavo.text.chat_template import ChatTemplateError

    try:
        yield
    except (EngineStartError, BindError) as error:
        raise ServeError(str(error)) from error
    except ChatTemplateError as error:
        text_side = options.model.tokenizer or directory
        raise ServeError(f"{text_side}: {error}; --chat-template FILE replaces it") from error


def _compute_for_another_machine(options: ServeOptions, directory: Path) -> None:
    """Without a server of its own, until the one of node 0 has ended. Raises ServeError."""
    from octavo.runtime.parallel.config import check
    from octavo.runtime.parallel.headless import run_ranks
    from octavo.runtime.parallel.headless_engines import run_engines
    from octavo.runtime.parallel.placement import find_devices

    config = engine_config(options, directory)
    try:
        check(config.parallel, find_devices(config.device), config.num_threads)
        (run_ranks if config.parallel.nnodes > 1 else run_engines)(config)
    except ValueError as error:
        raise ServeError(str(error)) from None


def _fleet_opener(options: ServeOptions, engines: Sequence[EngineProcess], launcher: Launcher) -> Callable[[], Fleet]:
    """What connects to the engines, in the event loop."""
    from octavo.server.fleet.fleet import Fleet
    from octavo.server.start.engines import fleet_limits, set_adapters

    def open_fleet() -> Fleet:
        fleet = Fleet(engines, launcher.start, fleet_limits(options), options.engine.seed)
        set_adapters(fleet, options)
        return fleet

    return open_fleet


def _check_tls(options: ListenOptions) -> None:
    """Read the certificate's files before the model is loaded, so that a missing one is reported at once."""
    if not (options.ssl_certfile or options.ssl_keyfile):
        return
    import ssl  # some 10 ms, which a start without a certificate need not take

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_certfile or "", options.ssl_keyfile)
        if options.ssl_ca_certs:
            context.load_verify_locations(options.ssl_ca_certs)
    except OSError as error:
        raise ServeError(f"--ssl-certfile, --ssl-keyfile, --ssl-ca-certs: {error}") from None


def allow_many_connections() -> None:
    """Raise the limit of open files, of which each connection takes one: shells start programs with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _bound(options: ListenOptions) -> Iterator[Listener]:
    """The socket to listen on, until the block ends: reserved before a model is loaded, so that a port that is taken is
    told at once.
    """
    listener = _bind(options)
    try:
        yield listener
    finally:
        listener.socket.close()
        if options.uds:
            Path(options.uds).unlink(missing_ok=True)


def _bind(options: ListenOptions) -> Listener:
    from octavo.server.listen_sockets import BindError, Listener, reserve_path, reserve_port

    try:
        if options.uds is not None:
            return Listener(reserve_path(options.uds), f"unix:{options.uds}")
        bound = reserve_port(options.host, options.port)
    except BindError as error:
        raise ServeError(str(error)) from None
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return Listener(bound, f"http{'s' if options.ssl_certfile else ''}://{shown}:{port}")


def _app_maker(
    options: ServeOptions, text: TextSide, begun: float, access: Access
) -> Callable[[Fleet, Ready, ModelFormats], tuple[FastAPI, Metrics]]:
    """What makes the app when the engine is ready, and prints the report of the start."""
    from octavo.commands.serve_report import print_report
    from octavo.server.app import build_app
    from octavo.server.fleet.collector import FleetCollector
    from octavo.server.kept import open_kept
    from octavo.server.start.served import made_metrics, served_model
    from octavo.server.start.weights import upkeep_of
    from octavo.server.store import StoreError

    try:
        kept = open_kept(options.server)
    except StoreError as error:
        raise ServeError(str(error)) from None

    def make_app(client: Fleet, ready: Ready, formats: ModelFormats) -> tuple[FastAPI, Metrics]:
        model = served_model(options, text, ready, formats, adapters=client.adapters)
        metrics = made_metrics(options, model.name, client, ready)
        metrics.register(FleetCollector(client, model.name))
        app = build_app(model, client, metrics, options.server, access, kept, *upkeep_of(options, client, model))
        print_report(client.readies, time.monotonic() - begun, formats.lines() + model.name_lines())
        return app, metrics

    return make_app


def _reporter(
    options: ServeOptions, text: TextSide, begun: float, places: Places
) -> Callable[[Fleet, Ready, ModelFormats], tuple[Metrics, FleetCounters]]:
    """What makes the metrics of the process that only has the engines, and prints the report of the start."""
    from octavo.commands.serve_report import print_report
    from octavo.server.fleet.collector import FleetCounters
    from octavo.server.start.served import made_metrics, served_model

    def report(client: Fleet, ready: Ready, formats: ModelFormats) -> tuple[Metrics, FleetCounters]:
        model = served_model(options, text, ready, formats, adapters=client.adapters)
        metrics = made_metrics(options, model.name, client, ready, places)
        print_report(client.readies, time.monotonic() - begun, formats.lines() + model.name_lines())
        return metrics, FleetCounters(client, model.name, metrics.registry, decides=True)

    return report


def access_of(options: ServeOptions) -> Access:
    """Who may send requests. Keys from the environment don't show in the list of processes."""
    server = options.server
    try:
        keys = api_keys(server.api_key, os.environ)
    except ValueError as error:
        raise ServeError(str(error)) from error
    if server.protect_all and not keys:
        raise ServeError("--protect-all asks for a key everywhere, and there is none: give one with --api-key")
    hosts = server.allowed_hosts or default_hosts(None if options.listen.uds else options.listen.host)
    return Access(keys, server.protect_all, tuple(hosts))
