"""Pooled requests from their prompts to what the engine has computed of each; the counterpart of `generation.generate`.

Whoever stops waiting ends the requests in the engine. No dialect is known here.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.runtime.messages import AddRequest, Pooled, PoolingParams, SamplingParams, TokenOutput
from octavo.server.admission import Ticket
from octavo.server.errors import ApiError, interrupted
from octavo.server.fleet.fleet import Fleet
from octavo.server.generation import ending
from octavo.server.metrics import Metrics, Timeline
from octavo.server.pooled_inputs import PooledPrompt
from octavo.server.served_model import ServedModel

NOTHING = SamplingParams(max_tokens=1, temperature=0.0)
_unique = itertools.count()


@dataclass(slots=True)
class PooledResult:
    """What one prompt gave: rows of `width` numbers. num_tokens: of the prompt."""

    pooled: Pooled
    num_tokens: int

    @property
    def values(self) -> array[float]:
        """All numbers of all rows."""
        found = array("f", self.pooled.data)
        if found.itemsize != 4:
            raise TypeError("an array of floats has 4 bytes for each")
        return found

    def vector(self) -> list[float]:
        """The numbers of its only row."""
        return self.values.tolist()

    def rows(self) -> list[list[float]]:
        """The numbers of each of its rows."""
        values = self.vector()
        width = self.pooled.width
        return [values[begin : begin + width] for begin in range(0, len(values), width)]


def pooled_requests(
    prompts: Sequence[PooledPrompt], params: PoolingParams, model: ServedModel, *, priority: int = 0, owner: str = ""
) -> list[AddRequest]:
    """A request of the engine for each prompt."""
    arrival = time.time()
    return [
        AddRequest(
            f"{model.server_name}pooled-{next(_unique)}",
            prompt.token_ids,
            NOTHING,
            arrival,
            priority=priority,
            owner=owner,
            pooling=params if prompt.second is None else with_second(params, prompt.second),
        )
        for prompt in prompts
    ]


def with_second(params: PoolingParams, second: int) -> PoolingParams:
    return PoolingParams(params.task, params.dimensions, params.use_activation, second)


async def pool(requests: Sequence[AddRequest], client: Fleet, metrics: Metrics, ticket: Ticket) -> list[PooledResult]:
    """What each request brought, in order. Raises ApiError when the engine fails or is dead."""
    timelines = {it.request_id: Timeline(it.arrival_time, len(it.token_ids)) for it in requests}
    found: dict[str, PooledResult] = {}

    def count(outcome: str) -> None:
        for request_id, timeline in timelines.items():
            if request_id not in found:
                metrics.end(timeline, outcome, 0)

    with ticket, ending(count):
        await ticket.within_time(client.resumed(), has_begun=False)
        async with client.open(requests, ticket.key_owner, ticket.name) as stream:
            ticket.open()
            for request_id, timeline in timelines.items():
                timeline.engine = stream.engine_of[request_id]
            while len(found) < len(requests):
                for output in await ticket.within_time(stream.next(), has_begun=bool(found)):
                    timeline = timelines[output.request_id]
                    timeline.engine = stream.engine_of[output.request_id]
                    found[output.request_id] = _result(output, timeline.num_prompt)
                    metrics.tokens(timeline, output, 0)
                    metrics.end(timeline, "stop", 0)
    return [found[request.request_id] for request in requests]


def _result(output: TokenOutput, num_tokens: int) -> PooledResult:
    if output.finish_reason == "error":
        raise ApiError(400 if output.is_refused else 500, output.error or "the engine failed on this request")
    if output.pooled is None:
        raise interrupted()
    return PooledResult(output.pooled, num_tokens)
