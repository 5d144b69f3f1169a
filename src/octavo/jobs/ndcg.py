"""nDCG: how far up a ranking has what answers a query, as trec_eval and BEIR compute it; and what of two is told apart.

A query's gain is its grades, each over log2(1 + rank), over that of the best order. Two models that rank for the same
queries are compared in pairs, and intervals are of bootstraps over queries: that many drawn again and again, each as
often as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CUTOFF = 10
DRAWS = 10_000
GROUP = 250  # draws that are in memory together
SEED = 0

Array = NDArray[np.float64]


def ndcg(scores: NDArray[np.floating], places: Mapping[int, int], ideal: Array, cutoff: int = CUTOFF) -> float:
    """Of one query. scores [documents]; places: the grades of those that answer it; ideal: all grades, also of those
    documents that are no candidates.

    Documents of one score share what their ranks give, which is the mean over all orders that they could have.
    """
    best = np.sort(ideal)[::-1][:cutoff]
    discounts = 1 / np.log2(np.arange(2, max(len(scores), len(best)) + 2))
    discounts[cutoff:] = 0
    most = float(best @ discounts[: len(best)])
    gain = 0.0
    for place, grade in places.items():
        above = int((scores > scores[place]).sum())
        alike = int((scores == scores[place]).sum())
        gain += grade * float(discounts[above : above + alike].mean())
    return gain / most


@dataclass(frozen=True)
class Interval:
    """A mean over queries, and the 95 % interval of what it would be over others."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RankingQuality:
    """nDCG of both models, and of the quantized one minus the original.

    better, worse  of how many queries
    depth          candidates of a query, which a reranker ranks; None: all documents
    """

    dataset: str
    num_queries: int
    num_documents: int
    depth: int | None
    ndcg: Interval
    original: Interval
    difference: Interval
    better: int
    worse: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        found = "a loss is seen" if self.difference.high < 0 else "a gain is seen" if self.difference.low > 0 else ""
        found = found or "no loss seen at this sample size"
        candidates = f", the {self.depth} candidates of BM25 each" if self.depth is not None else ""
        return (
            f"nDCG@{CUTOFF} over {self.num_queries:,} queries and {self.num_documents:,} documents of {self.dataset}"
            f"{candidates}: {_shown(self.ndcg)}; the original's {_shown(self.original)}\n"
            f"{found} ({self.difference.mean:+.4f}, 95 % interval {self.difference.low:+.4f} to "
            f"{self.difference.high:+.4f}; {self.worse} queries worse, {self.better} better)"
        )


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.4f} ({interval.low:.4f} to {interval.high:.4f})"


def intervals(ours: Array, originals: Array) -> tuple[Interval, Interval, Interval]:
    """Of nDCGs [queries] of both, and of their difference: percentiles of one bootstrap."""
    values = np.stack([ours, originals, ours - originals])
    random = np.random.default_rng(SEED)
    count = len(ours)
    means = np.empty((3, DRAWS))
    for begin in range(0, DRAWS, GROUP):
        often = random.multinomial(count, np.full(count, 1 / count), size=GROUP)
        means[:, begin : begin + GROUP] = values @ often.T / count
    low, high = np.quantile(means, (0.025, 0.975), axis=1)
    first, second, third = (
        Interval(float(values[i].mean()), float(low[i]), float(high[i])) for i in range(len(values))
    )
    return first, second, third
