"""How far two engines' answers are apart, in the figures of the tables."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.interop.peers import Answer, Place


@dataclass(frozen=True)
class Distance:
    """Over all places of the texts; log-probabilities in nats.

    mean, p99   of |difference of the next token's log-probability|
    lead_p99    99 of 100 times, the lead of one side's most likely token over its second is within this on the other
                side: a smaller lead is a near-tie between these two sides
    same_top    share of places where both find the same token most likely
    loss        by how much the second side's mean log-probability of the texts is lower
    """

    mean: float
    p99: float
    lead_p99: float
    same_top: float
    loss: float


def distance(a: Answer, b: Answer) -> Distance:
    pairs = list(zip(a.places, b.places, strict=True))
    moved = [abs(one[0] - two[0]) for one, two in pairs]
    leads = [abs(_lead(one, one) - _lead(one, two)) for one, two in pairs]
    return Distance(
        mean=sum(moved) / len(moved),
        p99=percentile(moved, 0.99),
        lead_p99=percentile(leads, 0.99),
        same_top=sum(_best(one)[0] == _best(two)[0] for one, two in pairs) / len(pairs),
        loss=sum(one[0] - two[0] for one, two in pairs) / len(pairs),
    )


def equal_tokens(ours: list[int], theirs: list[int]) -> int:
    """How many are equal from the start."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[round(part * (len(values) - 1))]


def _best(place: Place) -> list[int]:
    return sorted(place[1], key=lambda token: -place[1][token])[:2]


def _lead(judge: Place, place: Place) -> float:
    """At `place`, of the judge's most likely token over its second. One that isn't reported is under all that are."""
    lowest = min(place[1].values())
    first, second = (place[1].get(token, lowest) for token in _best(judge))
    return first - second
