"""Beam search over the prefix cache, as vLLM's server does it, and with its scores.

Each step asks the engine for the likeliest next tokens of all beams, one token each. A beam's tokens so far are the
prompt of its request, of which all full blocks are cached. Beams are ranked by the model's log-probabilities;
temperature and seed change nothing. A beam with an end token is put aside; the search goes on until max_tokens. The
score is the sum of the log-probabilities over (tokens of prompt and answer) ** length_penalty, without the end token.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from octavo.runtime.messages import AddRequest, FinishReason, Logprobs, SamplingParams, TokenOutput
from octavo.server.admission import Ticket
from octavo.server.errors import ApiError
from octavo.server.fleet.fleet import Fleet
from octavo.server.generation import Choice, Steps, by_prompt, count_end, counted_ends
from octavo.server.metrics import Metrics

_unique = itertools.count()


@dataclass(frozen=True, slots=True)
class Beam:
    """An answer as far as it is. logprobs: of each of its tokens, with the likeliest others."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    total: float = 0.0
    end: int | None = None

    def score(self, num_prompt: int, length_penalty: float) -> float:
        """vLLM's."""
        length = num_prompt + len(self.tokens) - (self.end is not None)
        return self.total / float(max(length, 1) ** length_penalty)

    def with_token(self, entry: Logprobs, place: int, *, is_end: bool) -> Beam:
        """The beam with the token at this place of the likeliest ones."""
        token = entry.top_ids[place]
        logprob = entry.top_logprobs[place]
        own = msgspec.structs.replace(entry, token_id=token, logprob=logprob, rank=place + 1)
        return Beam([*self.tokens, token], [*self.logprobs, own], self.total + logprob, token if is_end else None)


class AbortedError(RuntimeError):
    """Somebody else has ended the search."""


class Search:
    """The beams of one prompt, as many as there are choices."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = choices
        self.asked = choices[0].sent
        self.num_cached: int | None = None
        self._ends = frozenset(self.asked.params.stop_token_ids)
        self._forbidden = self.asked.params.forbidden
        self._beams = [Beam()]
        self._ended: list[Beam] = []

    @property
    def has_work(self) -> bool:
        """Whether there is a beam to go on with."""
        return bool(self._beams) and len(self._beams[0].tokens) < self.asked.params.max_tokens

    def requests(self) -> list[AddRequest]:
        """What the next step asks of the engine, a request for each beam."""
        asked = self.asked
        others = len(self._ends) + len({word[-1] for word in self._forbidden})
        count = max(2 * len(self.choices) + others, asked.params.logprobs or 0)
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=count)
        return [
            AddRequest(
                f"{asked.request_id}-beam-{next(_unique)}",  # engines tell by its beginning who asks
                asked.token_ids + beam.tokens,
                params,
                time.time(),
                asked.cache_salt,
                priority=asked.priority,
                owner=asked.owner,
                adapter=asked.adapter,
                source_ids=asked.source_ids,
            )
            for beam in self._beams
        ]

    def take(self, entries: Sequence[Logprobs]) -> None:
        """Go on by the likeliest tokens behind each beam."""
        width = len(self.choices)
        candidates: list[tuple[float, Beam, Logprobs, int]] = []
        for beam, entry in zip(self._beams, entries, strict=True):
            has_end = False
            allowed = [place for place, token in enumerate(entry.top_ids) if not self._is_forbidden(beam, token)]
            for rank, place in enumerate(allowed):
                if entry.top_ids[place] not in self._ends:
                    candidates.append((beam.total + entry.top_logprobs[place], beam, entry, place))
                elif not has_end and rank < 2 * width:  # of several end tokens the likeliest: the text is the same
                    has_end = True
                    self._ended.append(beam.with_token(entry, place, is_end=True))
        candidates.sort(key=lambda it: -it[0])
        self._beams = [beam.with_token(entry, place, is_end=False) for _, beam, entry, place in candidates[:width]]

    def _is_forbidden(self, beam: Beam, token: int) -> bool:
        """Whether a token behind a beam ends a sequence that the model's answers may not have."""
        return any(
            token == last and (not before or tuple(beam.tokens[-len(before) :]) == tuple(before))
            for *before, last in self._forbidden
        )

    def best(self) -> list[Beam]:
        """The best beam for each choice, best first; those that the search had no time to find are empty."""
        penalty = self.choices[0].length_penalty
        assert penalty is not None
        num_prompt = len(self.asked.token_ids)
        ranked = sorted([*self._ended, *self._beams], key=lambda beam: -beam.score(num_prompt, penalty))
        return (ranked + [Beam()] * len(self.choices))[: len(self.choices)]


async def search_beams(choices: Sequence[Choice], client: Fleet, metrics: Metrics, ticket: Ticket) -> Steps:
    """What `generate` does, for choices that are searched: one step, with all of each. Raises ApiError."""
    searches = [Search(alike) for alike in by_prompt(choices)]
    is_aborted = False
    with ticket, counted_ends(choices, metrics):
        try:
            while any(search.has_work for search in searches):
                await _step([search for search in searches if search.has_work], client, ticket)
        except AbortedError:  # the beams so far are the answers
            is_aborted = True
        deltas = []
        for search in searches:
            for choice, beam in zip(search.choices, search.best(), strict=True):
                output = _output(choice, beam, search.num_cached or 0, is_aborted=is_aborted)
                delta = choice.take(output)
                metrics.tokens(choice.timeline, output, len(delta.token_ids))
                count_end(choice, delta.finish_reason or "stop", metrics)
                deltas.append(delta)
        yield deltas


async def _step(searches: Sequence[Search], client: Fleet, ticket: Ticket) -> None:
    """The next token of all beams of these searches. Raises ApiError and AbortedError."""
    requests = [search.requests() for search in searches]
    everything = [request for of_search in requests for request in of_search]
    found: dict[str, Logprobs] = {}
    await ticket.within_time(client.resumed(), has_begun=searches[0].num_cached is not None)
    async with client.open(everything, ticket.key_owner, ticket.name) as stream:
        ticket.open()
        while len(found) < len(everything):
            for output in await ticket.within_time(stream.next(), has_begun=searches[0].num_cached is not None):
                if output.finish_reason == "error":
                    raise ApiError(400 if output.is_refused else 500, output.error or "the engine failed")
                if output.logprobs is None:
                    raise AbortedError
                found[output.request_id] = output.logprobs[0]
                for search, of_search in zip(searches, requests, strict=True):
                    if search.num_cached is None and output.request_id == of_search[0].request_id:
                        search.num_cached = output.num_cached_tokens
                        for choice in search.choices:
                            choice.timeline.engine = stream.engine_of[output.request_id]
    for search, of_search in zip(searches, requests, strict=True):
        search.take([found[request.request_id] for request in of_search])


def _output(choice: Choice, beam: Beam, num_cached: int, *, is_aborted: bool) -> TokenOutput:
    """A beam as if the engine had sampled it."""
    count = choice.request.params.logprobs
    logprobs = None
    finish_reason: FinishReason = "length" if beam.end is None else "stop"
    if is_aborted:
        finish_reason = "abort"
    if count is not None:
        logprobs = [
            msgspec.structs.replace(entry, top_ids=entry.top_ids[:count], top_logprobs=entry.top_logprobs[:count])
            for entry in beam.logprobs
        ]
    return TokenOutput(
        choice.request.request_id,
        beam.tokens,
        finish_reason,
        beam.end,
        logprobs=logprobs,
        num_cached_tokens=num_cached,
    )
