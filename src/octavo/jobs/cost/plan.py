"""Which loads a server gets, in which order: a rule over `measure`, which knows no server and no clock.

One repetition of everything that is closed comes before the search, which needs to know about what rate the server can
do, and the others behind it, so that a machine that changes its speed within the hour is seen in the spread.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import msgspec

from octavo.jobs.cost.loads import Kind, Load, Run, Sample
from octavo.jobs.cost.search import AROUND, Outcome, find_rate

TYPICAL_STEPS = 7  # of a bisection, for the estimate of the time

Measure = Callable[[Load], Run]


class PlanError(RuntimeError):
    """The server can't be measured by this plan; the message is one line."""


class Settings(msgspec.Struct, frozen=True):
    """How one server is measured. concurrency: ascending; the last one is to saturate the server."""

    slo: dict[str, float]
    percentile: float
    concurrency: tuple[int, ...]
    seconds: float
    repetitions: int
    seed: int

    @property
    def num_loads(self) -> int:
        """About how many loads a server gets."""
        return self.repetitions * (len(self.concurrency) + 2 + len(AROUND)) + TYPICAL_STEPS


def measure_server(measure: Measure, settings: Settings) -> None:
    """Put every load of the plan on a server. What comes next depends on what was measured and on nothing else.

    Raises PlanError.
    """
    seeds = count(settings.seed)

    def closed() -> list[Run]:
        loads: list[tuple[Kind, int]] = [("closed", concurrency) for concurrency in settings.concurrency]
        loads += [("prefill", settings.concurrency[-1]), ("cached", settings.concurrency[-1])]
        return [measure(Load(kind, settings.seconds, next(seeds), concurrency=n)) for kind, n in loads]

    def at_rate(rate: float) -> Outcome:
        rate = float(f"{rate:.4g}")  # as report.json keeps it: a run that goes on asks for the very same load
        sample = Sample(measure(Load("open", settings.seconds, next(seeds), rate=rate)), settings.slo)
        return Outcome(rate, sample.num_requests, sample.num_missed)

    first = [Sample(run, settings.slo).totals for run in closed() if run.load.kind == "closed"]
    rates = [run.output_tokens * run.answered / run.answer_tokens for run in first if run.answer_tokens]
    if not rates:
        raise PlanError(f"no request was answered in loads of {settings.seconds:g} s: --seconds must be more")
    start = max(rates)
    find_rate(at_rate, start, settings.percentile, settings.repetitions)
    for _ in range(settings.repetitions - 1):
        closed()
