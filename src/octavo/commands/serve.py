"""Serve a checkpoint behind an OpenAI-compatible HTTP server.

Flags are vLLM's; SGLang's names for them are accepted too.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.commands.failure import one_line
from octavo.commands.serve_flags import configure, engine_config
from octavo.server.access import Access, api_keys, default_hosts

if TYPE_CHECKING:
    from fastapi import FastAPI

    from octavo.runtime.messages import Ready
    from octavo.server.engine_client import EngineClient
    from octavo.server.metrics import Metrics
    from octavo.server.template_renderer import TemplateRenderer

__all__ = ["configure", "run"]

PROG = "octavo serve"


class ServeError(ValueError):
    """What is wrong with the command line, or with the model; one line."""


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code: 1 when it could not start, or the engine died."""
    begun = time.monotonic()
    logging.basicConfig(level=args.uvicorn_log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("octavo").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server listens; what is begun is cleared up
    try:
        alive = _serve(args, begun)
    except (ServeError, OSError) as error:
        print(f"{PROG}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0 if alive else 1


def _serve(args: argparse.Namespace, begun: float) -> bool:
    from octavo.runtime.launch import start_engine

    model = _model_of(args)
    _check_tls(args)
    access = _access(args)
    sockets, url = _bind(args)  # before the model is loaded: a port that is taken is known now
    engine = None
    try:
        directory = _directory_of(model, args.revision)
        engine = start_engine(engine_config(args, directory))  # it loads while the server's own modules are imported
        import uvloop

        from octavo.server.lifecycle import EngineStartError, ListenOptions, serve
        from octavo.server.listen_sockets import BindError
        from octavo.text.chat_template import ChatTemplateError

        _allow_many_connections()
        renderer, make_app = _app_maker(args, directory, begun, access)
        options = ListenOptions(
            sockets=sockets,
            url=url,
            shutdown_timeout=args.shutdown_timeout,
            engine_timeout=args.engine_timeout,
            outlive_engine=args.keep_alive_on_engine_death,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            log_stats=not args.disable_log_stats,
        )
        try:
            return uvloop.run(serve(engine, renderer, make_app, options))
        except (EngineStartError, BindError) as error:
            raise ServeError(str(error)) from error
        except ChatTemplateError as error:
            raise ServeError(f"{args.tokenizer or directory}: {error}; --chat-template FILE replaces it") from error
    finally:
        if engine is not None:
            engine.close()
        for bound in sockets:
            bound.close()
        if args.uds:
            Path(args.uds).unlink(missing_ok=True)


def _model_of(args: argparse.Namespace) -> str:
    named = [name for name in (args.model, args.model_flag) if name is not None]
    if len(named) != 1:
        raise ServeError("name one model: serve MODEL, a directory or a Hub id")
    model: str = named[0]
    return model


def _check_tls(args: argparse.Namespace) -> None:
    """The certificate's files are read when the model is loaded: too late to hear that one is missing."""
    if not (args.ssl_certfile or args.ssl_keyfile):
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(args.ssl_certfile or "", args.ssl_keyfile)
        if args.ssl_ca_certs:
            context.load_verify_locations(args.ssl_ca_certs)
    except OSError as error:
        raise ServeError(f"--ssl-certfile, --ssl-keyfile, --ssl-ca-certs: {error}") from None


def _directory_of(model: str, revision: str | None) -> Path:
    from octavo.quant.hub import resolve_model

    try:
        return resolve_model(model, revision)
    except ValueError as error:
        raise ServeError(str(error)) from error


def _allow_many_connections() -> None:
    """Each takes a file descriptor, and shells start programs with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind(args: argparse.Namespace) -> tuple[list[socket.socket], str]:
    """The reserved socket, and its address for people."""
    from octavo.server.listen_sockets import BindError, reserve_path, reserve_port

    try:
        if args.uds is not None:
            return [reserve_path(args.uds)], f"unix:{args.uds}"
        bound = reserve_port(args.host, args.port)
    except BindError as error:
        raise ServeError(str(error)) from None
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return [bound], f"http{'s' if args.ssl_certfile else ''}://{shown}:{port}"


def _app_maker(
    args: argparse.Namespace, directory: Path, begun: float, access: Access
) -> tuple[TemplateRenderer, Callable[[EngineClient, Ready], tuple[FastAPI, Metrics]]]:
    """Read the text side of the model now, while the engine loads; the rest when the engine is ready."""
    from octavo.server.app import ServerOptions, build_app
    from octavo.server.metrics import Metrics
    from octavo.server.served_model import ServedModel, end_token_ids, sampling_defaults
    from octavo.server.template_renderer import TemplateRenderer
    from octavo.text.chat_template import ChatTemplate, ChatTemplateError
    from octavo.text.tokenizer import Tokenizer, TokenizerError

    try:
        text_side = Path(args.tokenizer) if args.tokenizer else directory
        tokenizer = Tokenizer.open(text_side, trust_remote_code=args.trust_remote_code)
        renderer = TemplateRenderer(ChatTemplate.open(text_side, tokenizer.special_tokens, args.chat_template))
        defaults = sampling_defaults(directory, args.generation_config, args.override_generation_config)
        end_ids = end_token_ids(directory, tokenizer)
    except (TokenizerError, ChatTemplateError, ValueError) as error:
        raise ServeError(str(error)) from error
    options = ServerOptions(
        access=access,
        allowed_origins=tuple(args.allowed_origins),
        max_body_bytes=args.max_body_bytes,
        max_total_body_bytes=args.max_total_body_bytes,
        root_path=args.root_path,
        log_requests=args.enable_log_requests,
        docs=not args.disable_fastapi_docs,
    )

    def make_app(client: EngineClient, ready: Ready) -> tuple[FastAPI, Metrics]:
        model = ServedModel(
            names=tuple(args.served_model_name or [_model_of(args)]),
            root=_model_of(args),
            tokenizer=tokenizer,
            renderer=renderer,
            end_ids=end_ids,
            defaults=defaults,
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            max_logprobs=ready.vocab_size if args.max_logprobs < 0 else args.max_logprobs,
            trust_request_chat_template=args.trust_request_chat_template,
        )
        metrics = Metrics(model.name, ready, _cache_facts(args, ready))
        app = build_app(model, client, metrics, options)
        print_report(ready, time.monotonic() - begun)
        return app, metrics

    renderer.start()
    return renderer, make_app


def _access(args: argparse.Namespace) -> Access:
    """Who may ask. Keys of the environment are not seen in the list of processes."""
    try:
        keys = api_keys(args.api_key, os.environ)
    except ValueError as error:
        raise ServeError(str(error)) from error
    if args.protect_all and not keys:
        raise ServeError("--protect-all asks for a key everywhere, and there is none: give one with --api-key")
    hosts = args.allowed_hosts or default_hosts(None if args.uds else args.host)
    return Access(keys, args.protect_all, tuple(hosts))


def _cache_facts(args: argparse.Namespace, ready: Ready) -> dict[str, str]:
    """The labels of vllm:cache_config_info."""
    return {
        "block_size": str(ready.block_size),
        "num_gpu_blocks": str(ready.num_blocks),
        "cache_dtype": ready.report.kv_cache_dtype,
        "enable_prefix_caching": str(args.enable_prefix_caching),
    }


def print_report(ready: Ready, seconds: float) -> None:
    """The one table of a start: what runs, by which body, in how much memory, and how long each phase took."""
    from rich.console import Console
    from rich.table import Table

    from octavo.quant.printable import printable

    report = ready.report
    console = Console(soft_wrap=True, markup=False)
    table = Table(title=f"{report.architecture}, {report.dtype} on {report.device}", title_justify="left")
    for heading in ("layers", "scheme", "body"):
        table.add_column(heading)
    for row in report.layers:
        table.add_row(*map(printable, row))
    console.print(table)
    tokens = ready.num_blocks * ready.block_size
    console.print(
        f"weights {report.weight_bytes / 1e6:,.1f} MB; KV cache {report.kv_cache_bytes / 1e6:,.1f} MB in "
        f"{report.kv_cache_dtype}: {ready.num_blocks:,} blocks of {ready.block_size}, {tokens:,} tokens; "
        f"max_model_len {ready.max_model_len:,}",
        highlight=False,
    )
    phases = ", ".join(f"{phase} {duration:.2f}" for phase, duration in report.seconds.items())
    console.print(f"ready after {seconds:.2f} s (the engine: {phases})", highlight=False)
    for note in report.notes:
        console.print(f"note: {printable(note)}", style="yellow", highlight=False)
