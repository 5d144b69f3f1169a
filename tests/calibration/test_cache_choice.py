"""A KV cache in a budget: counted as it is served, and chosen together with the weights' schemes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from calibrated import calibration, held_out_tokens
from served import logits_of
from torch import Tensor

import octavo
from octavo.calibration.budget import best_in_budget, measure_caches, measure_recipes
from octavo.calibration.prepare import prepare
from octavo.calibration.progress import silent
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.sensitivity import measure
from octavo.calibration.target import Streams
from octavo.jobs.mixed_recipe import cache_room
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.weights import load_model
from octavo.runtime.worker.kv_cache import create

SCHEMES = ["W3A16@32", "W4A16@32", "W8A16@32"]
WIDTH = {None: 2, "fp8": 1, "int8/head": 1, "k=bf16,v=fp8": 1.5}


def served_with_its_cache(directory: Path, token_ids: Tensor) -> Tensor:
    """Log-probabilities [S, T, vocab], with the KV cache that the checkpoint asks for."""
    length = token_ids.shape[1]
    config = EngineConfig(model=str(directory), block_size=length, num_blocks=1, max_model_len=length)
    model = load_model(config)
    rows = []
    for ids in token_ids:
        caches, _ = create(model, config, [])
        step = StepInputs.prefill([length], length, token_ids=ids, logits_index=range(length))
        rows.append(model.forward(step, caches))
    return torch.stack(rows).log_softmax(-1)


def test_a_cache_is_chosen_with_the_weights(fixtures: Path, tmp_path: Path) -> None:
    """No scheme for all with any cache that fits loses less, as measured; and what is measured is what is served."""
    model = fixtures / "tiny"
    tokens = held_out_tokens(model, num_samples=16)
    ready = calibration(model, tokens)
    planned = prepare(model, tmp_path / "none", Recipe("W4A16@32", "rtn"), calibration=ready)
    cache = cache_room(planned, Streams(128, 16))
    caches = measure_caches(planned, ready, cache, silent)
    kls = {choice.kv_cache: choice.kl for choice in caches}
    assert kls.keys() == WIDTH.keys()
    assert kls[None] == 0
    assert min(kl for name, kl in kls.items() if name is not None) > 0
    assert kls["k=bf16,v=fp8"] < kls["fp8"]
    units = measure(planned, ready, SCHEMES, silent)
    weights = sum(unit.weights for unit in units)
    least = min(choice.bits for choice in caches)
    budget = 5.0 + least / weights  # with the smallest cache; the largest leaves no room for weights
    chosen = best_in_budget(planned, ready, units, budget, silent, caches)
    assert chosen.kv_cache is not None
    single = [
        msgspec.structs.replace(planned.recipe, scheme=scheme, kv_cache=choice.kv_cache)
        for i, scheme in enumerate(SCHEMES)
        for choice in caches
        if sum(unit.choices[i].bits for unit in units) + choice.bits <= budget * weights
    ]
    assert single
    kl, *others = measure_recipes(planned, ready, [chosen, *single], silent)
    assert kl <= min(others)
    quantize_model(prepare(model, tmp_path / "out", chosen, calibration=ready))
    truth = logits_of(model, tokens).log_softmax(-1)
    found = served_with_its_cache(tmp_path / "out", tokens)
    assert kl == pytest.approx(float((truth.exp() * (truth - found)).sum(-1).mean()), rel=0.1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Sentence {i} is about {i * i}, which is {i} times {i}." for i in range(60)))
    return path


def quantized(model: Path, out: Path, text: Path, **options: Any) -> tuple[int, str | None]:
    """Bytes of the weights' file, and the KV cache that was chosen."""
    how = {"data": str(text), "num_calibration_samples": 4, "max_seq_length": 64, "evaluate": False, "overwrite": True}
    octavo.quantize(model, out, scheme="W4A16@32", algorithm="rtn", **how, **options)
    recipe = json.loads((out / "recipe.json").read_text())
    return (out / "model.safetensors").stat().st_size, recipe["kv_cache"]


def test_a_size_holds_weights_and_cache(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """What fits goes into it; where all fits, nothing is rounded that needn't be."""
    model = fixtures / "tiny"
    config = json.loads((model / "config.json").read_text())
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 128 * 64
    most = 750_000 + numbers
    streams = {"max_model_len": 128, "max_num_seqs": 64}
    size, kv_cache = quantized(model, tmp_path / "out", text, target_size=most, **streams)
    assert kv_cache in ("fp8", "int8/head")
    assert 0.97 * most < size + numbers <= most
    assert quantized(model, tmp_path / "out", text, target_size=100_000_000, **streams)[1] is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_model_len": 64}, r"--max-model-len 64: a KV cache of that length counts with --target-size and --bits-"),
        ({"target_kl": 0.1, "max_model_len": 64}, "counts with --target-size and --bits-budget alone"),
        ({"bits_budget": 5, "max_num_seqs": 4}, "--max-num-seqs 4: how long these are is missing; --max-model-len"),
        ({"bits_budget": 5, "max_model_len": 1 << 40}, r"the model has \d+ positions; \d+ works"),
        (
            {"target_size": 400_000, "max_model_len": 128, "max_num_seqs": 64},
            r"the smallest schemes make [\d.]+MB with a KV cache of 64 sequences of 128 tokens; a target that they",
        ),
    ],
)
def test_what_is_not_counted_is_refused(
    fixtures: Path, tmp_path: Path, text: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        quantized(fixtures / "tiny", tmp_path / "out", text, **asked)
