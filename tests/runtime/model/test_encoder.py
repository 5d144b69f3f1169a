"""Encoders against transformers: the same random weights, float32, packed texts of unequal length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_oracle import CASES, ENDS, HEADS, LENGTHS, MODERN, SIZES, computed, expected, load, made, texts

from octavo.kernels.attention.step import StepInputs
from octavo.runtime.config import PoolerConfig
from octavo.runtime.messages import PoolingParams
from octavo.runtime.model.encoder_spec import UnsupportedEncoderError
from octavo.runtime.model.sources import LoadError


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, keys = CASES[name]
    theirs = made(family, keys, "Model", tmp_path)
    ours = load(tmp_path)
    packed = computed(ours, texts())
    for ids, hidden in zip(texts(), packed, strict=True):
        truth = expected(theirs, ids).last_hidden_state[0]
        torch.testing.assert_close(hidden, truth, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(computed(ours, [ids])[0], hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_scores_of_a_classifier_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, keys = CASES[name]
    theirs = made(family, keys, "ForSequenceClassification", tmp_path, num_labels=3)
    ours = load(tmp_path)
    found = ours.pooler.pool(computed(ours, texts()), [PoolingParams("classify")] * len(LENGTHS))
    for ids, scores in zip(texts(), found, strict=True):
        truth = expected(theirs, ids).logits[0].softmax(dim=-1)
        torch.testing.assert_close(scores, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_labels_of_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, keys = CASES[name]
    theirs = made(family, keys, "ForTokenClassification", tmp_path, num_labels=5)
    ours = load(tmp_path)
    (scores,) = ours.pooler.pool(computed(ours, texts([9])), [PoolingParams("token_classify", use_activation=False)])
    torch.testing.assert_close(scores, expected(theirs, texts([9])[0]).logits[0], atol=1e-4, rtol=1e-4)


def test_the_head_of_a_masked_model_is_left_out(tmp_path: Path) -> None:
    theirs = made("Bert", SIZES, "ForMaskedLM", tmp_path)
    ours = load(tmp_path)
    truth = expected(theirs.bert, texts()[0]).last_hidden_state[0]
    torch.testing.assert_close(computed(ours, texts())[0], truth, atol=1e-4, rtol=1e-4)


def test_token_types_of_pairs(tmp_path: Path) -> None:
    theirs = made("Bert", SIZES, "Model", tmp_path)
    ours = load(tmp_path)
    ids = texts([9, 5])
    types = torch.tensor([0] * 4 + [1] * 5 + [0] * 2 + [1] * 3)
    step = StepInputs.prefill([9, 5], 64, token_ids=ids[0] + ids[1], logits_index=torch.arange(14))
    step = StepInputs(**{**vars(step), "token_types": types})
    found = ours.hidden(step, []).split([9, 5])
    for hidden, one, own in zip(found, ids, types.split([9, 5]), strict=True):
        with torch.inference_mode():
            truth = theirs(torch.tensor([one]), token_type_ids=own[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden, truth, atol=1e-4, rtol=1e-4)


def test_long_windows_are_cut_out_of_long_texts(tmp_path: Path) -> None:
    keys = SIZES | MODERN | ENDS | {"max_position_embeddings": 700, "num_hidden_layers": 2}
    theirs = made("ModernBert", keys, "Model", tmp_path)
    ids = texts([600])
    truth = expected(theirs, ids[0]).last_hidden_state[0]
    torch.testing.assert_close(computed(load(tmp_path), ids)[0], truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish' is unknown"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' changes"),
        ({"is_decoder": True}, "is_decoder = True changes"),
        ({"architectures": ["BertForQuestionAnswering"]}, "makes no embeddings and no scores"),
        ({"num_hidden_layers": 2}, "tensors that this architecture doesn't: encoder.layer.2"),
        ({"num_hidden_layers": 4}, "no weights for encoder.layer.3"),
        ({"intermediate_size": 128}, r"is \[96, 64\] in the checkpoint; config.json makes it \[128, 64\]"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    made("Bert", SIZES, "Model", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((LoadError, UnsupportedEncoderError), match=said):
        load(tmp_path)


def test_options_that_mean_nothing_to_an_encoder_are_refused(tmp_path: Path) -> None:
    made("Bert", SIZES, "Model", tmp_path)
    with pytest.raises(LoadError, match="--runner generate: bert is an encoder"):
        load(tmp_path, runner="generate")
    with pytest.raises(LoadError, match="--deterministic: bert is an encoder"):
        load(tmp_path, deterministic=True)
    with pytest.raises(LoadError, match="--kv-cache-dtype: bert is an encoder, which is not served with it"):
        load(tmp_path, kv_cache_dtype="fp8_e4m3")
    with pytest.raises(LoadError, match="--lm-head-dtype: bert is an encoder, which is not served with it"):
        load(tmp_path, lm_head_dtype="int8")
    with pytest.raises(LoadError, match="--max-model-len 65: the model has 64 positions"):
        load(tmp_path, max_model_len=65)
    with pytest.raises(LoadError, match="dimensions 65: embeddings have 64"):
        load(tmp_path, pooler_config=PoolerConfig(dimensions=65))
