"""Where new weights of a served model may come from, and how engines with them are started."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.quant.model_files import CheckpointError, read_object_if_any
from octavo.quant.printable import shown
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.renewal import Renewal, UpdateError
from octavo.server.fleet.sleep import Sleep
from octavo.server.given_directory import within
from octavo.server.served_model import ServedModel, WeightVersion
from octavo.server.start.engines import launcher_of
from octavo.server.start.flags import ServeError, ServeOptions

if TYPE_CHECKING:
    from octavo.runtime.launch import EngineProcess
    from octavo.runtime.messages import Ready

MAY_DIFFER = frozenset(
    {"quantization_config", "compression_config", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
)
"""Keys of config.json that say nothing of the tensors' shapes, nor of what is computed with them."""


class Weights:
    """New weights for one served model.

    directory: of the checkpoint that is served at first; the text side stays its own. ready: what its engines have
    said. version: what is told of the weights in answers.
    """

    def __init__(
        self, renewal: Renewal, options: ServeOptions, directory: Path, ready: Ready, version: WeightVersion
    ) -> None:
        self._renewal = renewal
        self.version = version
        self._options = options
        self._directory = directory
        self._ready = ready
        root = options.upkeep.weights_root
        self._root = None if root is None else Path(root).resolve()

    async def update(self, path: str, version: str | None = None, *, aborts: bool = False) -> int:
        """Serve the checkpoint in this directory; returns how many open requests go on with it. Raises UpdateError.

        version: what answers call it; None: its path. aborts: open requests end instead.
        """
        directory = self._allowed(path)
        self._check(directory)
        before = self.version.name

        def undone() -> None:
            self.version.name = before

        count = await self._renewal.renew(self._starter(directory), aborts=aborts, undone=undone)
        self.version.name = version or path
        return count

    def _allowed(self, path: str) -> Path:
        try:
            directory = within(path, self._root, "--weights-root")
        except ValueError as error:
            raise UpdateError(str(error)) from None
        if not (directory / "config.json").is_file():
            raise UpdateError(f"{path[:200]!r} is no directory of a checkpoint: it has no config.json")
        return directory

    def _check(self, directory: Path) -> None:
        """Raise UpdateError for a checkpoint of another model."""
        try:
            served, given = (read_object_if_any(it / "config.json") for it in (self._directory, directory))
        except CheckpointError as error:
            raise UpdateError(str(error)) from None
        if (place := difference(served, given)) is not None:
            key, one, other = place
            raise UpdateError(
                f"config.json says {key} {shown(other)}, and that of the model that is served {shown(one)}; weights "
                "of the same model work"
            )

    def _starter(self, directory: Path) -> Callable[[int], EngineProcess]:
        """What starts engines with it, whose KV caches are as large as those of now."""
        engine = self._options.engine
        same = msgspec.structs.replace(engine, num_blocks=self._ready.num_blocks, kv_cache_memory_bytes=None)
        try:
            return launcher_of(dataclasses.replace(self._options, engine=same), directory).start
        except ServeError as error:
            raise UpdateError(str(error)) from None


def difference(served: dict[str, Any], given: dict[str, Any], place: str = "") -> tuple[str, object, object] | None:
    """The first key in which two config.json mean different models, with both values."""
    for key in sorted((served.keys() | given.keys()) - MAY_DIFFER):
        one = served.get(key)
        other = given.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            if (found := difference(one, other, f"{place}{key}.")) is not None:
                return found
        elif one != other:
            return f"{place}{key}", one, other
    return None


def upkeep_of(options: ServeOptions, fleet: Fleet, model: ServedModel) -> tuple[Sleep | None, Weights | None]:
    """What requests may do to the engines, as the options say: put them to sleep, and give them new weights."""
    sleep = Sleep(fleet)
    weights = None
    if options.upkeep.enable_weight_updates:
        ready = fleet.readies[0]
        engine = options.engine  # a port, and a file, that two processes can't have
        is_alone = engine.kv_events_config.is_on or engine.kv_offloading_path is not None
        assert model.directory is not None
        renewal = Renewal(fleet, sleep, beside=ready.report.device.startswith("cpu") and not is_alone)
        weights = Weights(renewal, options, model.directory, ready, model.weights)
    return sleep if options.upkeep.enable_sleep_mode else None, weights
