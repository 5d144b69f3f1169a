"""Poolers, and the files of sentence-transformers that they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from tiny_encoders import SentenceModel, write

from octavo.runtime.config import EngineConfig, PoolerConfig
from octavo.runtime.messages import PoolingParams
from octavo.runtime.model.encoder import Encoder
from octavo.runtime.model.pooler_choice import num_labels, probabilities_of
from octavo.runtime.model.pooling import Pooler, PoolingKind
from octavo.runtime.model.sentence_files import read_modules
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model

ROWS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.arange(1.0, 6.0)
TRUTHS = {
    "cls": ROWS[0],
    "last": ROWS[4],
    "mean": ROWS.mean(0),
    "max": ROWS.max(0).values,
    "mean_sqrt_len": ROWS.sum(0) / 5**0.5,
    "weighted_mean": (WEIGHTS @ ROWS) / WEIGHTS.sum(),
}


@pytest.mark.parametrize("kind", get_args(PoolingKind))
def test_kinds_of_pooling(kind: Any) -> None:
    pooler = Pooler(("embed",), (kind,), (), 8, normalizes=False)
    (found,) = pooler.pool([ROWS], [PoolingParams()])
    torch.testing.assert_close(found, TRUTHS[kind])


def test_several_kinds_stand_side_by_side() -> None:
    pooler = Pooler(("embed",), ("cls", "mean"), (), 16)
    (found,) = pooler.pool([ROWS], [PoolingParams()])
    whole = torch.cat([ROWS[0], ROWS.mean(0)])
    torch.testing.assert_close(found, whole / whole.norm())


def test_requests_of_one_step_may_differ() -> None:
    pooler = Pooler(("embed", "token_embed"), ("last",), (), 8)
    asked = [PoolingParams(dimensions=3), PoolingParams("token_embed", use_activation=False), PoolingParams()]
    cut, rows, whole = pooler.pool([ROWS] * 3, asked)
    torch.testing.assert_close(cut, ROWS[4, :3] / ROWS[4, :3].norm())
    torch.testing.assert_close(rows, ROWS)
    torch.testing.assert_close(whole, ROWS[4] / ROWS[4].norm())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, "softmax"),
        ({"num_labels": 1}, "sigmoid"),
        ({"problem_type": "regression"}, "none"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "none"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
    ],
)
def test_what_logits_become(config: dict[str, Any], found: str) -> None:
    assert probabilities_of(config, num_labels(config)) == found


def test_files_of_sentence_transformers(tmp_path: Path) -> None:
    SentenceModel(tmp_path)
    write(tmp_path / "1_Pooling/config.json", {"pooling_mode": ["mean", "lasttoken"]})
    found = read_modules(tmp_path)
    assert found is not None
    assert (found.kinds, found.normalizes, found.max_length) == (("mean", "last"), True, 32)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.WordWeights"}], "module WordWeights is unknown"),
        ("modules.json", {"type": "x"}, "is no list of modules"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling mode 'median' is unknown"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "names no way of pooling"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt false"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Mish"}, "'mish' is unknown"),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual"),
    ],
)
def test_modules_that_are_not_known_are_refused(tmp_path: Path, file: str, change: Any, said: str) -> None:
    SentenceModel(tmp_path)
    write(tmp_path / file, change)
    with pytest.raises(LoadError, match=said):
        read_modules(tmp_path)


def test_a_dense_layer_must_fit_what_is_pooled(tmp_path: Path) -> None:
    SentenceModel(tmp_path)
    save_file({"linear.weight": torch.zeros(4, 63)}, tmp_path / "2_Dense/model.safetensors")
    with pytest.raises(LoadError, match="reads 63 numbers; there are 64"):
        load_model(EngineConfig(model=str(tmp_path), dtype="float32"))


def test_flags_change_the_pooler(tmp_path: Path) -> None:
    model = SentenceModel(tmp_path)
    config = PoolerConfig(pooling_type="CLS", use_activation=False, dimensions=10)
    loaded = load_model(EngineConfig(model=str(tmp_path), dtype="float32", pooler_config=config))
    assert isinstance(loaded, Encoder)
    (found,) = loaded.pooler.pool([torch.ones(2, 64) * torch.tensor([[1.0], [5.0]])], [PoolingParams()])
    torch.testing.assert_close(found, torch.tanh(model.dense.sum(1))[:10])


def test_a_request_s_own_fields_hold_against_the_flags(tmp_path: Path) -> None:
    model = SentenceModel(tmp_path)
    config = PoolerConfig(use_activation=False, dimensions=10)
    loaded = load_model(EngineConfig(model=str(tmp_path), dtype="float32", pooler_config=config))
    assert isinstance(loaded, Encoder)
    size = len(model.dense)
    (found,) = loaded.pooler.pool([torch.ones(2, 64)], [PoolingParams(dimensions=size, use_activation=True)])
    assert len(found) == size
    assert float(found.norm()) == pytest.approx(1.0)
    classifier = Pooler(("classify",), ("last",), (), 1, probabilities="sigmoid", activates=False)
    asked = [PoolingParams("classify"), PoolingParams("classify", use_activation=True)]
    logit, probability = classifier.pool([torch.ones(1, 1)] * 2, asked)
    assert (float(logit[0]), float(probability[0])) == (1.0, float(torch.sigmoid(torch.ones(()))))


def test_without_modules_vllms_rule_holds(tmp_path: Path) -> None:
    SentenceModel(tmp_path)
    (tmp_path / "modules.json").unlink()
    loaded = load_model(EngineConfig(model=str(tmp_path), dtype="float32"))
    assert loaded.pooler is not None
    assert (loaded.pooler.kinds, loaded.pooler.normalizes, loaded.max_position) == (("cls",), True, 40)
    assert any("no modules.json" in note for note in loaded.notes)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 40
