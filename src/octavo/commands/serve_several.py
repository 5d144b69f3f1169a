"""`octavo serve --config FILE` where the file names several models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from octavo.server.access import Access
from octavo.server.start.flags import ServeError, ServeOptions, other_names
from octavo.server.store import MEMORY, OFF, StoreError

if TYPE_CHECKING:
    from octavo.server.listen_sockets import Listener

NOT_FOR_SEVERAL = "with several models is not supported"


def check_several(common: ServeOptions, of_models: Mapping[str, ServeOptions]) -> None:
    """Raise ServeError for what a server of several models doesn't do."""
    server = common.server
    upkeep = common.upkeep
    wrong = {
        f"--api-server-count {common.listen.api_server_count}": common.listen.api_server_count > 1,
        f"--batch-dir {server.batch_dir}": server.batch_dir is not None,
        f"--response-store {server.response_store}": server.response_store not in (MEMORY, OFF),
        "--enable-sleep-mode": upkeep.enable_sleep_mode,
        "--enable-weight-updates": upkeep.enable_weight_updates,
        f"--weights-root {upkeep.weights_root}": upkeep.weights_root is not None,
    }
    for what in [what for what, is_so in wrong.items() if is_so]:
        raise ServeError(f"{what} {NOT_FOR_SEVERAL}: one server for each such model works")
    whose = dict.fromkeys(of_models, "a model's")
    for name, options in of_models.items():
        for own in sorted(other_names(options) - {name}):
            if own in whose:
                raise ServeError(f"models: {name}: the name {own!r} is {whose[own]} already; a name means one model")
            whose[own] = f"that of {name}"
        parallel = options.engine.parallel
        is_elsewhere = parallel.is_on_ray or parallel.nnodes > 1 or parallel.headless
        if is_elsewhere or len(parallel.local_engines) < parallel.data_parallel_size:
            raise ServeError(f"models: {name}: an engine on other machines {NOT_FOR_SEVERAL}; -tp works")


def serve_several(
    common: ServeOptions, of_models: Mapping[str, ServeOptions], access: Access, listener: Listener
) -> bool:
    """Serve until SIGTERM or SIGINT; returns that all is well. Raises ServeError."""
    from octavo.collector import uncollected

    with uncollected():
        import uvloop

        from octavo.server.several.serving import serve_models

    limit = common.several.max_loaded_models
    print(f"{len(of_models)} models, loaded as they are asked for", end="")
    print("" if limit is None else f", {limit} at a time", flush=True)
    try:
        uvloop.run(serve_models(common, of_models, access, listener))
    except StoreError as error:
        raise ServeError(str(error)) from None
    return True
