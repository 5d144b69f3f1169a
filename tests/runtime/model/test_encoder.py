"""Encoders against transformers: the same random weights, float32, packed texts of unequal length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.runtime.config import EngineConfig, PoolerConfig
from octavo.runtime.messages import PoolingParams
from octavo.runtime.model.encoder import Encoder
from octavo.runtime.model.encoder_spec import UnsupportedEncoderError
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
DISTIL = {"vocab_size": 120, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64}
ROPES = {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 30.0}}
MODERN: dict[str, Any] = {"local_attention": 6, "rope_parameters": ROPES, "norm_bias": True, "attention_bias": True}
ENDS = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SIZES),
    "bert, tanh": ("Bert", SIZES | {"hidden_act": "gelu_new", "type_vocab_size": 1}),
    "roberta": ("Roberta", SIZES),
    "xlm-roberta": ("XLMRoberta", SIZES | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "distilbert": ("DistilBert", DISTIL | {"activation": "relu"}),
    "mpnet": ("MPNet", SIZES),
    "modernbert": ("ModernBert", SIZES | MODERN | ENDS),
    "modernbert, no biases": ("ModernBert", SIZES | ENDS | {"layer_types": ["full_attention"] * 3, "mlp_bias": True}),
    "nomic_bert": ("NomicBert", SIZES | {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}),
    "gte": ("Gte", SIZES | {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}),
}
HEADS = [name for name in CASES if "," not in name]
LENGTHS = [7, 40, 7, 1, 23]


def made(family: str, keys: dict[str, Any], head: str, directory: Path, **more: Any) -> transformers.PreTrainedModel:
    """A model with weights that make every part of it count, saved."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keys, **more, attn_implementation="eager")
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.ndim == 1) * 0.5)
    model.save_pretrained(directory)
    return model


def load(directory: Path, **options: Any) -> Encoder:
    model = load_model(EngineConfig(model=str(directory), dtype="float32", **options))
    assert isinstance(model, Encoder)
    return model


def texts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 120, (length,), generator=generator).tolist() for length in lengths]


def computed(model: Encoder, ids: list[list[int]]) -> list[Tensor]:
    """The hidden states of each text, of one step with all of them."""
    lengths = [len(one) for one in ids]
    flat = [token for one in ids for token in one]
    step = StepInputs.prefill(lengths, 64, token_ids=flat, logits_index=torch.arange(len(flat)))
    return list(model.hidden(step, []).split(lengths))


@torch.inference_mode()
def expected(model: transformers.PreTrainedModel, ids: list[int]) -> Any:
    tokens = torch.tensor([ids])
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens))


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
    with pytest.raises(LoadError, match="--max-model-len 65: the model has 64 positions"):
        load(tmp_path, max_model_len=65)
    with pytest.raises(LoadError, match="dimensions 65: embeddings have 64"):
        load(tmp_path, pooler_config=PoolerConfig(dimensions=65))
