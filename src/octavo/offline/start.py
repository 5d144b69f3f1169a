"""Start a model's engines, and then import what speaks to them: they load meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.offline.arguments import options_of
from octavo.server.start.engines import directory_of, launcher_of
from octavo.server.start.flags import check_upkeep

if TYPE_CHECKING:
    from octavo.offline.model import OfflineModel

logger = logging.getLogger(__name__)


def start(model: str, given: Mapping[str, Any]) -> OfflineModel:
    """A model that loads. given: keyword arguments, by vLLM's names. Raises TypeError and ValueError."""
    options, notes = options_of(model, given)
    for note in notes:
        logger.warning("LLM: %s", note)
    check_upkeep(options)
    directory = directory_of(model, options.model)
    launcher = launcher_of(options, directory)
    engines = launcher.start_all()
    try:
        from octavo.offline.model import OfflineModel

        return OfflineModel(options, directory, launcher, engines)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
