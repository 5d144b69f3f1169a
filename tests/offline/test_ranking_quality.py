"""`octavo eval` of models that embed or rerank: nDCG of both versions against transformers and scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import ndcg_score
from tiny_encoders import SIZE, CrossEncoder, SentenceModel

from octavo.cli import main
from octavo.jobs.retrieval import Retrieval
from octavo.ranking_quality import RankingError, measure_ranking

DOCUMENTS = [
    "the cat sat",
    "a red mat",
    "green and blue",
    "say yes",
    "run cats",
    "blue mat on mat",
    "no",
    "red",
    "2 cats",
]
DOCUMENTS += ["cats", "sat on a green mat", "a cat", "run"]
QUERIES = ["red cats", "mat", "say no", "green"]
GRADES = [{11: 2, 7: 1}, {1: 1, 10: 1, 5: 3}, {6: 1}, {2: 1, 10: 1}]
SHORT = {"num_threads": 1}


@pytest.fixture(scope="module")
def retrieval() -> Retrieval:
    return Retrieval(
        "words",
        {f"d{i}": text for i, text in enumerate(DOCUMENTS)},
        {f"q{i}": text for i, text in enumerate(QUERIES)},
        {f"q{i}": {f"d{place}": grade for place, grade in grades.items()} for i, grades in enumerate(GRADES)},
        depth=20,
    )


def truth(score: Callable[[str, str], float]) -> float:
    """The mean nDCG of a model by scikit-learn."""
    grades = np.zeros((len(QUERIES), len(DOCUMENTS)))
    for number, each in enumerate(GRADES):
        for place, grade in each.items():
            grades[number, place] = grade
    return float(ndcg_score(grades, [[score(query, text) for text in DOCUMENTS] for query in QUERIES], k=10))


def cosine(model: SentenceModel) -> Callable[[str, str], float]:
    """Queries stand behind the model's prompt for them."""
    return lambda query, text: float(model.embedding(f"query: {query}") @ model.embedding(text))


def test_embeddings_are_ranked_beside_those_of_the_original(
    forked: None,  # noqa: ARG001
    retrieval: Retrieval,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the command, over a data set in files. The other model's last layer has noise, as rounding would make."""
    original, other = SentenceModel(tmp_path / "original"), SentenceModel(tmp_path / "other")
    other.dense = other.dense + 0.5 * torch.randn(SIZE, 64, generator=torch.Generator().manual_seed(7))
    save_file({"linear.weight": other.dense}, other.directory / "2_Dense/model.safetensors")
    dataset = tmp_path / "words"
    (dataset / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", retrieval.documents), ("queries", retrieval.queries)):
        rows = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (dataset / f"{name}.jsonl").write_text("\n".join(rows))
    lines = [f"{q}\t{d}\t{grade}" for q, grades in retrieval.relevance.items() for d, grade in grades.items()]
    (dataset / "qrels/test.tsv").write_text("\n".join(lines))
    asked = ["eval", str(other.directory), "--against", str(original.directory), "--dataset", str(dataset)]
    assert main([*asked, "--dtype", "float32", "--json", str(tmp_path / "out.json"), "--max-ndcg-loss", "0"]) == 3
    content = json.loads((tmp_path / "out.json").read_text())
    ranking = content["ranking"]
    assert ranking["original"]["mean"] == pytest.approx(truth(cosine(original)), abs=1e-9)
    assert ranking["ndcg"]["mean"] == pytest.approx(truth(cosine(other)), abs=1e-9)
    assert ranking["difference"]["low"] < ranking["difference"]["mean"] < 0
    assert (ranking["num_queries"], ranking["num_documents"]) == (len(QUERIES), len(DOCUMENTS))
    assert content["mean"] < 1
    printed = capsys.readouterr().out
    assert f"nDCG@10 over 4 queries and 13 documents of words: {ranking['ndcg']['mean']:.4f}" in printed
    assert "--max-ndcg-loss is 0" in printed


def test_a_reranker_orders_candidates(forked: None, retrieval: Retrieval, tmp_path: Path) -> None:  # noqa: ARG001
    model = CrossEncoder(tmp_path / "one")
    found = measure_ranking(model.directory, model.directory, retrieval, SHORT, {"dtype": "float32"})
    assert found.depth == len(DOCUMENTS)
    expected = truth(lambda query, text: float(model.logits(query, text)))
    assert found.ndcg.mean == found.original.mean == pytest.approx(expected, abs=1e-9)
    assert (found.better, found.worse, found.difference.low, found.difference.high) == (0, 0, 0, 0)


def test_what_puts_nothing_in_order_is_refused(forked: None, retrieval: Retrieval, tmp_path: Path) -> None:  # noqa: ARG001
    model = CrossEncoder(tmp_path / "three", num_labels=3)
    with pytest.raises(RankingError, match="three has 3 labels: nDCG is of models that embed, and of rerankers"):
        measure_ranking(model.directory, model.directory, retrieval, SHORT)


def test_a_data_set_needs_a_model_that_ranks(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(fixtures / "tiny")
    assert main(["eval", tiny, "--against", tiny, "--dataset", "somewhere"]) == 1
    assert "--dataset is about models that embed or rerank, and this one generates text" in capsys.readouterr().err
