"""Data sets of retrieval; nDCG against scikit-learn, intervals against all draws there are, BM25 against a formula."""

from __future__ import annotations

import itertools
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from octavo.jobs.bm25 import OF_LENGTH, SATURATION, Bm25
from octavo.jobs.ndcg import intervals, ndcg
from octavo.jobs.retrieval import RetrievalError, built_in_retrieval, read_retrieval

CORPUS = [{"_id": "a", "title": "Cats", "text": "They sat."}, {"_id": "b", "text": "red"}, {"_id": "7", "text": "mat"}]
QUERIES = [{"_id": "q", "text": "the cat"}, {"_id": "r", "text": "on a mat"}, {"_id": "unused", "text": "x"}]
QRELS = "query-id\tcorpus-id\tscore\nq\ta\t2\nq\tb\t0\nr\t7\t1\n"


def beir(directory: Path, corpus: Any = CORPUS, queries: Any = QUERIES, qrels: str = QRELS) -> Path:
    """A data set in BEIR's layout; a text is a file's content as it is."""
    (directory / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        content = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(content)
    (directory / "qrels/test.tsv").write_text(qrels)
    return directory


@pytest.mark.parametrize("seed", range(20))
def test_ndcg_is_that_of_scikit_learn(seed: int) -> None:
    """Also where documents have the same score, which a rounded model gives."""
    random = np.random.default_rng(seed)
    grades = random.integers(0, 4, 40) * (random.random(40) < 0.3)
    grades[0] = 1
    scores = random.integers(0, 12, 40).astype(np.float32)
    places = {int(place): int(grades[place]) for place in np.flatnonzero(grades)}
    found = ndcg(scores, places, np.array(list(places.values()), np.float64))
    assert found == pytest.approx(ndcg_score([grades], [scores], k=10), rel=1e-12)


def test_what_is_no_candidate_counts_as_not_found() -> None:
    """One of two answers is at the top; the other is not among the candidates."""
    scores = np.array([3.0, 2.0, 1.0])
    found = ndcg(scores, {0: 1}, np.array([1.0, 1.0]))
    assert found == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_few_documents_and_many_answers() -> None:
    """More answers than ranks: ten of them are all that can be gained."""
    grades = np.ones((1, 15))
    scores = np.arange(15.0)
    assert ndcg(scores, dict.fromkeys(range(15), 1), grades[0]) == pytest.approx(ndcg_score(grades, [scores], k=10))


def test_an_interval_is_the_quantiles_of_all_draws() -> None:
    """Of four queries there are 256 draws; neither quantile is near the edge of a value's share of them."""
    ours = np.array([0.0, 0.1, 0.4, 1.0])
    originals = np.array([0.5, 0.1, 0.3, 0.9])
    for found, values in zip(intervals(ours, originals), (ours, originals, ours - originals), strict=True):
        means = np.sort([np.mean(draw) for draw in itertools.product(values, repeat=4)])
        assert found.mean == pytest.approx(values.mean())
        assert found.low == pytest.approx(np.quantile(means, 0.025, method="inverted_cdf"))
        assert found.high == pytest.approx(np.quantile(means, 0.975, method="inverted_cdf"))


def test_bm25_is_its_formula() -> None:
    documents = [[1, 2, 2, 3], [2, 4], [], [5, 1, 1, 1, 1, 6]]
    mean = sum(map(len, documents)) / 4
    query = [1, 2, 2, 9]
    truth = []
    for terms in documents:
        total = 0.0
        for term in query:
            holders = sum(term in other for other in documents)
            rarity = math.log(1 + (4 - holders + 0.5) / (holders + 0.5))
            often = terms.count(term)
            norm = SATURATION * (1 - OF_LENGTH + OF_LENGTH * len(terms) / mean)
            total += rarity * often / (often + norm)
        truth.append(total)
    index = Bm25(documents)
    np.testing.assert_allclose(index.scores(query), truth, rtol=1e-12)
    assert index.best(query, 3) == sorted(range(4), key=lambda place: -truth[place])[:3]


def test_each_built_in_question_has_its_passage() -> None:
    found = built_in_retrieval()
    assert len(found.queries) == len(found.relevance) > 60
    assert len(set(found.documents.values())) == len(found.documents) > 80
    assert all(
        list(grades.values()) == [1] and set(grades) <= set(found.documents) for grades in found.relevance.values()
    )
    for name, query in found.queries.items():  # words in common give none of them away
        (answer,) = found.relevance[name]
        assert query.lower() not in found.documents[answer].lower()


def test_a_data_set_is_read_as_beir_reads_it(tmp_path: Path) -> None:
    directory = beir(tmp_path / "cats")
    found = read_retrieval(directory)
    assert found.name == "cats"
    assert found.documents == {"a": "Cats They sat.", "b": "red", "7": "mat"}
    assert found.queries == {"q": "the cat", "r": "on a mat"}
    assert found.relevance == {"q": {"a": 2}, "r": {"7": 1}}
    (directory / "qrels/dev.tsv").write_text("r\tb\t1\nq\tb\t0\nr\tgone\t1\n")
    other = read_retrieval(directory / "qrels/dev.tsv")
    assert other.relevance == {"r": {"b": 1, "gone": 1}}
    assert len(other.notes) == 2
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in directory.rglob("*"):
            file.write(path, f"cats/{path.relative_to(directory)}")
    zipped = read_retrieval(tmp_path / "set.zip")
    assert (zipped.documents, zipped.relevance) == (found.documents, found.relevance)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"corpus": "{"}, r"corpus.jsonl, line 1 is no JSON"),
        ({"corpus": "[" * 100_000}, r"corpus.jsonl, line 1 is no JSON"),
        ({"corpus": "[]"}, "no _id that is a string"),
        ({"corpus": [{"_id": 7, "text": "x"}]}, "no _id that is a string"),
        ({"corpus": [{"_id": "a", "text": None}]}, "'a' has no text that is a string"),
        ({"corpus": [{"_id": "a", "text": "x", "title": 1}]}, "'a' has no text that is a string"),
        ({"corpus": [*CORPUS, CORPUS[0]]}, "line 4: the _id 'a' is there twice"),
        ({"corpus": ""}, "has no documents"),
        ({"queries": QUERIES[:1]}, "the query 'r' is not in queries.jsonl"),
        ({"qrels": "q\ta\n"}, "line 1: 2 columns; query-id, corpus-id and score"),
        ({"qrels": "q\ta\tmuch\n"}, "the score 'much' is no whole number"),
        ({"qrels": f"q\ta\t{10**30}\n"}, "is too large"),
        ({"qrels": "q\ta\t1\nq\ta\t2\n"}, "line 2: two scores for 'q' and 'a'"),
        ({"qrels": "q\ta\t0\n"}, "no query has a document that answers it"),
    ],
)
def test_what_is_wrong_in_a_data_set_is_told(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match=said):
        read_retrieval(beir(tmp_path / "set", **changed))


def test_what_is_no_data_set_is_told(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_text("x")
    (tmp_path / "bad.tsv").write_bytes(b"\xff\xff")
    for name, said in (("", "has no corpus.jsonl"), ("no.zip", "no zip file"), ("bad.tsv", "not UTF-8")):
        with pytest.raises(RetrievalError, match=said):
            read_retrieval(tmp_path / name)
