"""BM25 (Robertson and Zaragoza 2009): the documents that have a query's terms most, for a reranker to put in order.

Terms are token ids, so that a text of any language has some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SATURATION = 0.9  # k1, and
OF_LENGTH = 0.4  # b, as Anserini has them for BEIR


class Bm25:
    """An index of documents, each a list of terms."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        lengths = np.array([len(terms) for terms in documents], np.float64)
        mean = max(float(lengths.mean()), 1.0)
        self._norms = SATURATION * (1 - OF_LENGTH + OF_LENGTH * lengths / mean)
        counts: dict[int, tuple[list[int], list[int]]] = {}
        for place, terms in enumerate(documents):
            for term, count in Counter(terms).items():
                places, often = counts.setdefault(term, ([], []))
                places.append(place)
                often.append(count)
        self._postings = {term: (np.array(places), np.array(often)) for term, (places, often) in counts.items()}

    def scores(self, query: Sequence[int]) -> NDArray[np.float64]:
        """Of each document."""
        total = len(self._norms)
        found = np.zeros(total)
        for term, times in Counter(query).items():
            if term in self._postings:
                places, often = self._postings[term]
                rarity = np.log1p((total - len(places) + 0.5) / (len(places) + 0.5))
                found[places] += times * rarity * often / (often + self._norms[places])
        return found

    def best(self, query: Sequence[int], count: int) -> list[int]:
        """The places of the best documents, the first of several alike first."""
        return [int(place) for place in np.argsort(-self.scores(query), kind="stable")[:count]]
