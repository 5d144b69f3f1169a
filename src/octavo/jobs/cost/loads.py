"""What is sent to a server and what came of it, as plain values that report.json keeps.

A load lasts `seconds`. Its first tenth is sent and not counted (WARM_UP), so that a run is not judged by the time in
which its queue and its batch fill up. The rest is cut into SEGMENTS, which the bootstrap draws from: neighbors in time
share a queue, so single requests are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec
import numpy as np

WARM_UP = 0.1
SEGMENTS = 10

Kind = Literal["open", "closed", "prefill", "cached"]
LATENCIES = ("ttft", "tpot", "e2el")
Slo = Mapping[str, float]  # 'ttft', 'tpot' or 'e2el' -> milliseconds


class Load(msgspec.Struct, frozen=True, omit_defaults=True):
    """One load.

    open     requests at random times, `rate` of them a second, whatever the server does (a Poisson process)
    closed   `concurrency` clients, each of which sends its next request when it has its answer
    prefill  closed, with answers of one token; each prompt is new
    cached   as prefill, with prompts that were sent before
    """

    kind: Kind
    seconds: float
    seed: int
    rate: float | None = None
    concurrency: int | None = None

    def __str__(self) -> str:
        if self.kind == "open":
            return f"{self.rate:.3g} requests/s"
        names = {
            "closed": "concurrency",
            "prefill": "prompts alone, concurrency",
            "cached": "cached prompts, concurrency",
        }
        return f"{names[self.kind]} {self.concurrency}"


class Answers(msgspec.Struct, frozen=True):
    """The counted requests that were answered, a list for each property.

    Times are milliseconds from the intended time of sending.

    at       seconds from the load's begin to the intended time of sending
    tpot     milliseconds per token behind the first; 0 for an answer of one
    cached   tokens of the prompt that the server had cached; None where it doesn't say
    """

    at: list[float] = []
    ttft: list[float] = []
    tpot: list[float] = []
    e2el: list[float] = []
    inputs: list[int] = []
    outputs: list[int] = []
    cached: list[int | None] = []


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """One load as it went.

    output_tokens, input_tokens   that arrived in each segment of the counted time (a prompt's with its first token)
    failed_in      the segment of each counted request that failed; errors: the reasons, each once
    busy_elsewhere cores that other programs kept busy just before
    memory         bytes of the server's processes just after
    joules         that the machine used in the counted time
    """

    load: Load
    answers: Answers
    output_tokens: list[float]
    input_tokens: list[float]
    failed_in: list[int] = []
    errors: list[str] = []
    busy_elsewhere: float | None = None
    memory: int | None = None
    joules: float | None = None

    @property
    def counted_seconds(self) -> float:
        """The length of the counted time."""
        return self.load.seconds * (1 - WARM_UP)


class Totals(NamedTuple):
    """A run's counts per second of the counted time, and the rate that it was sent at (0 for a closed load)."""

    rate: float
    requests: float  # failed ones too
    missed: float  # beyond a limit of the SLO, or failed
    answered: float
    prompt_tokens: float  # of the answered requests
    answer_tokens: float
    output_tokens: float  # that arrived
    input_tokens: float
    watts: float = 0.0  # of the machine; 0 where it doesn't tell


class Sample:
    """A run cut into segments of time, which the bootstrap draws from. Latencies are in milliseconds."""

    def __init__(self, run: Run, slo: Slo) -> None:
        answers = run.answers
        self.load = run.load
        self.num_requests = len(answers.at) + len(run.failed_in)
        self._times = {name: np.asarray(getattr(answers, name), dtype=float) for name in LATENCIES}
        missed = np.any([self._times[name] > limit for name, limit in slo.items()], axis=0)
        self.num_missed = int(missed.sum()) + len(run.failed_in)
        places = (np.asarray(answers.at, dtype=float) / run.load.seconds - WARM_UP) / (1 - WARM_UP) * SEGMENTS
        segment = np.clip(places.astype(int), 0, SEGMENTS - 1)
        failed = np.bincount(np.asarray(run.failed_in, dtype=int), minlength=SEGMENTS)
        answered = np.bincount(segment, minlength=SEGMENTS)
        columns = (
            answered + failed,
            np.bincount(segment, weights=missed, minlength=SEGMENTS) + failed,
            answered,
            np.bincount(segment, weights=answers.inputs, minlength=SEGMENTS),
            np.bincount(segment, weights=answers.outputs, minlength=SEGMENTS),
            run.output_tokens,
            run.input_tokens,
            [(run.joules or 0.0) / SEGMENTS] * SEGMENTS,
        )
        self._columns = np.column_stack(columns) * SEGMENTS / run.counted_seconds
        self._members = [np.flatnonzero(segment == number) for number in range(SEGMENTS)]

    @property
    def totals(self) -> Totals:
        """The run as it was."""
        return Totals(self.load.rate or 0.0, *self._columns.mean(0).tolist())

    def drawn_totals(self, rng: np.random.Generator) -> Totals:
        """Of as many segments, drawn with replacement."""
        drawn = self._columns[rng.integers(0, SEGMENTS, SEGMENTS)]
        return Totals(self.load.rate or 0.0, *drawn.mean(0).tolist())

    @property
    def times(self) -> Mapping[str, np.ndarray]:
        """The latencies of the answered requests, by their names."""
        return self._times

    def drawn_times(self, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        """Of as many segments, drawn with replacement."""
        members = np.concatenate([self._members[number] for number in rng.integers(0, SEGMENTS, SEGMENTS)])
        return {name: times[members] for name, times in self._times.items()}
