"""Seeds for requests that come without one: another engine then goes on with the same draws."""

from __future__ import annotations

import random

import msgspec

from octavo.runtime.messages import AddRequest

SEED_BITS = 62  # n answers count up from it, and it must stay an int64


class Seeds:
    """Those of one fleet."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def seeded(self, request: AddRequest) -> AddRequest:
        """The request with a seed, where it draws."""
        if request.params.seed is not None or request.params.temperature == 0:
            return request
        params = msgspec.structs.replace(request.params, seed=self._random.getrandbits(SEED_BITS))
        return msgspec.structs.replace(request, params=params)
