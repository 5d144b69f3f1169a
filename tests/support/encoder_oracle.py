"""Tiny random encoders of every model type, and what transformers makes of the same texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.encoder import Encoder
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
