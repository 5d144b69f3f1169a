"""Which of the measured models to serve: the cheapest at the SLO among those whose quality is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.jobs.cost.quality import CostQuality
from octavo.jobs.cost.state import ServerState
from octavo.jobs.cost.statistics import Interval

LEAST_AGREEMENT = 0.95  # of the most likely tokens, where a server doesn't let the KL divergence be measured


@dataclass(frozen=True)
class Choice:
    """best: None where no model keeps the SLO with a quality that is known to do. alike: as cheap, as far as is seen.

    rejected: (label, why) of the others
    """

    best: ServerState | None
    alike: tuple[ServerState, ...]
    rejected: tuple[tuple[str, str], ...]


def price(server: ServerState) -> Interval | None:
    """Dollars per million output tokens at the SLO, all in."""
    return server.values.get("slo_usd_all_in")


def choose(servers: Sequence[ServerState], max_kl: float) -> Choice:
    """The first of `servers` is what the others' quality is measured against."""
    rejected = []
    fitting: list[tuple[float, ServerState, Interval]] = []
    for number, server in enumerate(servers):
        dollars = price(server)
        reason = _unmeasured(server) if dollars is None else "" if number == 0 else _bad(server.quality, max_kl)
        if reason or dollars is None:
            rejected.append((server.label, reason))
        else:
            fitting.append((dollars.value, server, dollars))
    if not fitting:
        return Choice(None, (), tuple(rejected))
    fitting.sort(key=lambda row: row[0])
    _, best, cheapest = fitting[0]
    alike = tuple(server for _, server, dollars in fitting[1:] if dollars.overlaps(cheapest))
    return Choice(best, alike, tuple(rejected))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by cost, of the (cost, loss) that no other one beats in both."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front: list[int] = []
    for i in order:
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def _unmeasured(server: ServerState) -> str:
    if server.problem:
        return server.problem
    if server.figures is None:
        return "not measured"
    return "no rate that was tried keeps the SLO"


def _bad(quality: CostQuality | None, max_kl: float) -> str:
    if quality is None:
        return "its quality was not measured"
    if quality.kl is not None:
        kl = quality.kl.value
        return f"mean KL {kl:.3f} is above --max-kl {max_kl:g}" if kl > max_kl else ""
    if quality.top1 is None:
        return f"its quality was not measured ({quality.missing})"
    agreement = quality.top1.value
    if agreement < LEAST_AGREEMENT:
        return f"it finds the same token most likely in {agreement:.1%} only, under {LEAST_AGREEMENT:.0%}"
    return ""
