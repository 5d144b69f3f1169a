"""A server whose latencies are known: one request at a time, each for the same time, the others wait (M/D/1).

It stands in for a real one in virtual time: a load of an hour takes a millisecond.
"""

from __future__ import annotations

import math

import numpy as np

from octavo.jobs.cost.loads import SEGMENTS, WARM_UP, Answers, Load, Run


def waiting_below(rate: float, service: float, seconds: float) -> float:
    """P(wait <= seconds) for Poisson arrivals (Erlang 1909; Crommelin 1932)."""
    terms = (
        (-rate * (seconds - k * service)) ** k / math.factorial(k) * math.exp(rate * (seconds - k * service))
        for k in range(math.floor(seconds / service) + 1)
    )
    return (1 - rate * service) * math.fsum(terms)


def highest_rate(service: float, limit: float, percentile: float) -> float:
    """The rate at which `percentile` of the requests wait and are served within `limit` seconds."""
    return highest_rate_of_waits(service, limit - service, percentile)


def highest_rate_of_waits(service: float, longest: float, percentile: float) -> float:
    """The rate at which `percentile` of the requests wait up to `longest` seconds."""
    low, high = 0.0, 1 / service
    for _ in range(60):
        middle = (low + high) / 2
        if waiting_below(middle, service, longest) >= percentile / 100:
            low = middle
        else:
            high = middle
    return low


def waits(gaps: np.ndarray, services: np.ndarray) -> np.ndarray:
    """How long each request waits (Lindley's recursion): behind arrivals that are `gaps` apart."""
    surplus = np.concatenate([[0.0], np.cumsum(services[:-1] - gaps[1:])])
    return surplus - np.minimum.accumulate(surplus)


INPUTS = 256  # tokens of each prompt
OUTPUTS = 64


class QueueServer:
    """service: seconds a request takes. A prompt is a share `prefill` of it; then come the answer's tokens, evenly.

    drift: standard deviation of the machine's speed from load to load, as a share; busy: cores that others use.
    """

    def __init__(self, service: float, *, prefill: float = 0.25, drift: float = 0.0, busy: float = 0.0) -> None:
        self.service = service
        self.prefill = prefill
        self.drift = drift
        self.busy = busy
        self.loads: list[Load] = []

    def measure(self, load: Load) -> Run:
        """What `octavo.jobs.cost` sees of a load."""
        self.loads.append(load)
        rng = np.random.default_rng(load.seed)
        service = self.service * math.exp(rng.normal(0, self.drift)) if self.drift else self.service
        tokens = OUTPUTS
        if load.kind in ("prefill", "cached"):
            service *= self.prefill * (0.1 if load.kind == "cached" else 1.0)
            tokens = 1
        prefill = service if tokens == 1 else service * self.prefill
        if load.kind == "open":
            assert load.rate is not None
            gaps = rng.exponential(1 / load.rate, max(2, int(rng.poisson(load.rate * load.seconds))))
            at = np.cumsum(gaps)
            begun = at + waits(gaps, np.full(len(gaps), service))
        else:
            assert load.concurrency is not None
            begun = np.arange(0, load.seconds, service)
            at = np.maximum(begun - (load.concurrency - 1) * service, 0.0)
        return self._run(load, at, begun + prefill, begun + service, tokens)

    def _run(self, load: Load, at: np.ndarray, first: np.ndarray, last: np.ndarray, tokens: int) -> Run:
        begin = load.seconds * WARM_UP
        counted = (at >= begin) & (at < load.seconds)
        edges = np.linspace(begin, load.seconds, SEGMENTS + 1)
        count = int(counted.sum())
        ttft, tpot, e2el = (
            1e3 * values[counted] for values in (first - at, (last - first) / max(1, tokens - 1), last - at)
        )
        return Run(
            load,
            Answers(
                at=at[counted].tolist(),
                ttft=ttft.tolist(),
                tpot=tpot.tolist(),
                e2el=e2el.tolist(),
                inputs=[INPUTS] * count,
                outputs=[tokens] * count,
                cached=[None] * count,
            ),
            output_tokens=(np.histogram(last, edges)[0] * tokens).tolist(),
            input_tokens=(np.histogram(first, edges)[0] * float(INPUTS)).tolist(),
            busy_elsewhere=self.busy,
            memory=10**9,
        )
