"""What stands in front of a model's engines: its directory, who starts them, and how patient a fleet is with them.

Imported before engines are started, which would start later by as long as its imports take.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from octavo.runtime.launch import Launcher
from octavo.runtime.parallel.address import check_addresses
from octavo.server.fleet.limits import FleetLimits
from octavo.server.start.flags import ServeError, ServeOptions, engine_config, model_of

if TYPE_CHECKING:
    from octavo.runtime.config import EngineConfig
    from octavo.server.fleet.fleet import Fleet
    from octavo.server.options import ModelOptions
    from octavo.server.processes.places import Places


def directory_of(model: str, options: ModelOptions) -> Path:
    """Where the model is, of a Hub id when its files are here. Raises ServeError."""
    from octavo.quant.hub import resolve_model

    try:
        return resolve_model(model, options.revision, options.download_dir)
    except ValueError as error:
        raise ServeError(str(error)) from error


def launcher_of(options: ServeOptions, directory: Path, places: Places | None = None) -> Launcher:
    """What starts the engines. places: where they meet further server processes. Raises ServeError."""
    config = _with_draft_model(engine_config(options, directory), options.model)
    try:
        check_addresses(config.parallel, os.environ)
        return Launcher(config) if places is None else Launcher(config, addresses=places.addresses)
    except ValueError as error:
        raise ServeError(str(error)) from None


def _with_draft_model(config: EngineConfig, options: ModelOptions) -> EngineConfig:
    """With the draft model's directory in place of its name. Raises ServeError."""
    speculative = config.speculative_config
    if speculative is None or not speculative.model:
        return config
    from octavo.quant.hub import resolve_model

    try:
        draft = resolve_model(speculative.model, speculative.revision, options.download_dir)
    except ValueError as error:
        raise ServeError(f"--speculative-config: {error}") from error
    own = msgspec.structs.replace(speculative, model=str(draft))
    return msgspec.structs.replace(config, speculative_config=own)


def fleet_limits(options: ServeOptions) -> FleetLimits:
    """How patient a fleet is with its engines, and how it chooses among them."""
    parallel = options.engine.parallel
    return FleetLimits(
        options.listen.engine_timeout,
        parallel.migration_limit,
        parallel.max_engine_restarts,
        parallel.engine_restart_delay,
        routing=parallel.routing,
        caches=options.engine.enable_prefix_caching,
    )


def set_adapters(fleet: Fleet, options: ServeOptions) -> None:
    """What is said of adapters on the command line. Those that are served at start are loaded later."""
    adapters = fleet.adapters
    adapters.max_loras = options.engine.lora.max_loras if options.engine.lora.enable_lora else None
    adapters.is_open = options.lora.enable_runtime_lora
    adapters.root = None if options.lora.lora_root is None else Path(options.lora.lora_root).resolve()
    names = options.model.served_model_name or (model_of(options.model),)
    adapters.reserved = frozenset({*names, *options.model.model_aliases})
