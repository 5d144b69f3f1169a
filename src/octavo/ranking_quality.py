"""What a quantization costs a model that retrieves or reranks: nDCG of both versions, by what a program gets of each.

Embeddings rank all documents by their cosine to a query. A reranker scores the candidates that BM25 finds. Both models
run as `octavo.LLM` runs them, one after the other; the original in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.calibration.progress import Progress, silent
from octavo.calibration.verify import NotFiniteError, Side
from octavo.jobs.bm25 import Bm25
from octavo.jobs.ndcg import RankingQuality, intervals, ndcg
from octavo.jobs.retrieval import Retrieval
from octavo.llm import LLM
from octavo.pooling_params import PoolingParams
from octavo.text.tokenizer import Tokenizer

AT_A_TIME = 4096  # texts or pairs that are with the model together
OF_QUERIES = ("query", "search_query")  # names of prompts in config_sentence_transformers.json
OF_DOCUMENTS = ("document", "search_document", "passage", "corpus")

Matrix = NDArray[np.float32]
Told = Callable[[float, float], None]


class RankingError(ValueError):
    """A model that puts nothing in order; the message is one line."""


def measure_ranking(
    original: Path,
    quantized: Path,
    retrieval: Retrieval,
    options: Mapping[str, Any] | None = None,
    of_quantized: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> RankingQuality:
    """options: arguments of both LLMs; of_quantized: of that one beside them.

    Raises RankingError for a model that neither embeds nor scores, NotFiniteError, and what LLM raises.
    """
    candidates = _Candidates(retrieval, original)
    shared = dict(options or {})
    of_original = {**shared, "dtype": "float32"}
    before = _ndcgs(original, of_original, candidates, "original", progress)
    after = _ndcgs(quantized, {**shared, **(of_quantized or {})}, candidates, "quantized", progress)
    ours, originals, difference = intervals(after, before)
    return RankingQuality(
        retrieval.name,
        len(retrieval.queries),
        len(retrieval.documents),
        candidates.depth,
        ours,
        originals,
        difference,
        better=int((after > before).sum()),
        worse=int((after < before).sum()),
        notes=retrieval.notes,
    )


class _Candidates:
    """A data set, and for rerankers the documents that each query's order is made of, found when they are first asked
    for. depth: how many there are of a query; None: nobody has asked.
    """

    def __init__(self, retrieval: Retrieval, tokenizer: Path) -> None:
        self.retrieval = retrieval
        self.documents = list(retrieval.documents.values())
        self.names = {name: place for place, name in enumerate(retrieval.documents)}
        self.depth: int | None = None
        self._tokenizer = tokenizer
        self._found: list[list[int]] = []

    def found(self) -> list[list[int]]:
        """Of each query, places of documents."""
        if self.depth is None:
            tokenizer = Tokenizer.open(self._tokenizer)

            def terms(text: str) -> list[int]:
                return tokenizer.encode(text.lower(), add_special_tokens=False)

            index = Bm25([terms(text) for text in self.documents])
            self.depth = min(self.retrieval.depth, len(self.documents))
            for name, query in self.retrieval.queries.items():
                best = index.best(terms(query), self.depth + 1)
                self._found.append([place for place in best if place != self.names.get(name)][: self.depth])
        return self._found

    def ndcg(self, query: str, places: Sequence[int] | None, scores: NDArray[np.floating]) -> float:
        """Of scores of documents at these places; None: all. A document of the query's own name is no answer (BEIR)."""
        own = self.names.get(query)
        grades = self.retrieval.relevance[query]
        at = {self.names[name]: grade for name, grade in grades.items() if name in self.names}
        if places is None:
            scores = scores if own is None else np.where(np.arange(len(scores)) == own, -np.inf, scores)
        else:
            at = {number: at[place] for number, place in enumerate(places) if place in at}
        return ndcg(scores, at, np.array(list(grades.values()), np.float64))


def _ndcgs(
    directory: Path, options: Mapping[str, Any], candidates: _Candidates, side: Side, progress: Progress
) -> NDArray[np.float64]:
    """Of each query."""

    def told(done: float, total: float) -> None:
        progress(done, total, side)

    progress(0, 1, f"loading the {side}")
    with LLM(str(directory), **options) as llm:
        tasks = () if llm.pooled is None else llm.pooled.facts.tasks
        if "embed" in tasks:
            return _by_embedding(llm, candidates, side, told)
        if llm.pooled is not None and "classify" in tasks and llm.pooled.facts.size == 1:
            return _by_score(llm, candidates, side, told)
        said = "generates text" if llm.pooled is None else f"has {llm.pooled.facts.size} labels"
        raise RankingError(f"{directory.name} {said}: nDCG is of models that embed, and of rerankers, which have one")


def _by_embedding(llm: LLM, candidates: _Candidates, side: Side, told: Told) -> NDArray[np.float64]:
    retrieval = candidates.retrieval
    total = len(candidates.documents) + len(retrieval.queries)
    documents = _embedded(llm, candidates.documents, OF_DOCUMENTS, side, lambda done: told(done, total))
    texts = list(retrieval.queries.values())
    queries = _embedded(llm, texts, OF_QUERIES, side, lambda done: told(len(documents) + done, total))
    return np.array([candidates.ndcg(name, None, documents @ queries[i]) for i, name in enumerate(retrieval.queries)])


def _embedded(llm: LLM, texts: Sequence[str], names: Sequence[str], side: Side, told: Callable[[int], None]) -> Matrix:
    """Of length 1, [texts, size], behind the prompt of the first name that the model has."""
    assert llm.pooled is not None
    prompt_name = next((name for name in names if name in llm.pooled.prompts), None)
    params = PoolingParams(truncate_prompt_tokens=-1, use_activation=True, prompt_name=prompt_name)
    found: list[Matrix] = []
    for begin in range(0, len(texts), AT_A_TIME):
        part = list(texts[begin : begin + AT_A_TIME])
        outputs = llm.embed(part, pooling_params=params, use_tqdm=False)
        found.append(np.array([output.outputs.embedding for output in outputs], np.float32))
        told(begin + len(part))
    vectors = np.concatenate(found)
    _check_finite(vectors, side)
    return vectors


def _by_score(llm: LLM, candidates: _Candidates, side: Side, told: Told) -> NDArray[np.float64]:
    """By logits, as probabilities near 1 are alike."""
    retrieval = candidates.retrieval
    found = candidates.found()
    texts = list(retrieval.queries.values())
    pairs = [(number, place) for number, places in enumerate(found) for place in places]
    params = PoolingParams(use_activation=False)
    values: list[float] = []
    for begin in range(0, len(pairs), AT_A_TIME):
        part = pairs[begin : begin + AT_A_TIME]
        one = [texts[number] for number, _ in part]
        other = [candidates.documents[place] for _, place in part]
        outputs = llm.score(one, other, truncate_prompt_tokens=-1, pooling_params=params, use_tqdm=False)
        values += [output.outputs.score for output in outputs]
        told(len(values), len(pairs))
    scores = np.array(values, np.float64)
    _check_finite(scores, side)
    ends = np.cumsum([len(places) for places in found])[:-1]
    each = np.split(scores, ends)
    return np.array([candidates.ndcg(name, found[i], each[i]) for i, name in enumerate(retrieval.queries)])


def _check_finite(values: NDArray[np.floating], side: Side) -> None:
    if not np.isfinite(values).all():
        raise NotFiniteError(side, "gives NaN or infinite embeddings or scores")
