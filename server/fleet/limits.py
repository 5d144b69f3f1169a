"""What a fleet is told: how patient it is with its engines, and how it chooses among them."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.runtime.parallel.config import Routing


@dataclass(frozen=True)
class FleetLimits:
    """silence: seconds for which an engine may be frozen, or hang in one layer, before it is killed.

    migrations: how many dying engines may have had an answer in their batch; one more ends it with an error, as does
    each one with 0. restarts: of each engine, in ten minutes; the first one first_restart seconds after its death, and
    each later one after twice as long. routing: which engine gets a request. caches: whether engines cache prefixes.
    keeps_all: outputs wait for their readers however many they are, since these are no clients, which may not read.
    """

    silence: float = 20.0
    migrations: int = 1
    restarts: int = 3
    first_restart: float = 1.0
    routing: Routing = "prefix"
    caches: bool = True
    keeps_all: bool = False
