"""Adapters over ranks: logits are PEFT's, each rank having its rows of B, or its columns of A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from divided import adapted_logits, divergence, prompts
from hf_oracle import CASES, make_hf, save
from peft_oracle import ATTENTION, EXPERTS, PeftOracle, assert_near
from ranks import Ranks
from torch import Tensor
from trimmed import whole

from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.group import ALONE

MIXTURE = {"target_modules": list(ATTENTION), "target_parameters": EXPERTS, "lora_dropout": 0.0}
FUSED = {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
DORA = {"use_dora": True, "target_modules": ["q_proj", "v_proj", "gate_proj"], "bias": "lora_only"}
ENDS = {"target_modules": ["lm_head", "embed_tokens", "o_proj"], "bias": "all"}

# Of each: architecture, PEFT's config, ranks, stages, whether ranks have whole experts.
DIVIDED: dict[str, tuple[str, dict[str, Any], int, int, bool]] = {
    "biases": ("llama", {"bias": "all"}, 2, 1, False),
    "DoRA of rows": ("llama", DORA, 3, 1, False),
    "ends": ("llama", ENDS, 2, 1, False),
    "stages": ("qwen2", {}, 2, 2, False),
    "ends of stages": ("gemma2", {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}, 2, 2, False),
    "both": ("qwen2", {}, 4, 2, False),
    "fused": ("phi3", FUSED, 2, 1, False),
    "experts": ("qwen3_moe", MIXTURE, 2, 1, False),
    "whole experts": ("qwen3_moe", MIXTURE, 2, 1, True),
}


def settings(size: int, stages: int, is_whole: bool) -> ParallelConfig:
    return ParallelConfig(
        tensor_parallel_size=size // stages, pipeline_parallel_size=stages, enable_expert_parallel=is_whole
    )


@pytest.mark.parametrize("name", DIVIDED)
def test_logits_over_ranks_are_those_of_peft(name: str, ranks: Ranks, tmp_path: Path) -> None:
    family, config, size, stages, is_whole = DIVIDED[name]
    base = make_hf(*CASES[family])
    saving = {"save_embedding_layers": False}
    one, other = (PeftOracle(base, tmp_path / str(seed), seed=seed, saving=saving, **config) for seed in (1, 2))
    directories = [one.directory, other.directory]
    directory = save(base, tmp_path / "base")
    found = ranks.run(adapted_logits, size, directory, directories, settings(size, stages, is_whole))[0]
    ids = prompts()
    assert_near(found[0], one.logits(ids[0]))
    assert_near(found[2], other.logits(ids[2]))


def test_dora_of_divided_columns_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    base = make_hf(*CASES["llama"])
    oracle = PeftOracle(base, tmp_path / "adapter", use_dora=True, target_modules=["o_proj"])
    directory = save(base, tmp_path / "base")
    for said in ranks.run(adapted_logits, 2, directory, [oracle.directory], settings(2, 1, False)):
        assert "use_dora asks for the norms of whole rows, and -tp divides the layer's columns" in said


def test_adapters_read_what_ranks_round_together_as_it_is(ranks: Ranks, fixtures: Path, tmp_path: Path) -> None:
    """W8A8: the input of a layer whose columns are divided is rounded with a column that an adapter doesn't see."""
    directory = whole(fixtures / "tiny--llmc-w8a8", tmp_path)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(fixtures / "tiny", dtype=torch.float32)
    adapters = [PeftOracle(base, tmp_path / str(seed), seed=seed, bias="all").directory for seed in (1, 2)]
    alone = adapted_logits(ALONE, directory, adapters, ParallelConfig())
    driver = ranks.run(adapted_logits, 2, directory, adapters, settings(2, 1, False))[0]
    for ours, theirs in zip(driver, alone, strict=True):
        assert isinstance(theirs, Tensor)
        assert divergence(ours, theirs) <= 1e-5
