"""Kernels are compiled while a server starts, and never while it serves: asked of Triton's own dispatcher."""

from __future__ import annotations

import json
from pathlib import Path

import first_launches
import pytest
import torch
from compiling import printed
from hf_oracle import CASES, make_hf, save

from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.operators import REFERENCE
from octavo.runtime.model.weights import load_model
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.warm_up import run_steps

pytestmark = pytest.mark.long

SAMPLERS = {"_add_biases", "_choose", "_masses", "_peaks", "_punish"}
MEASURED = {"_rope", "_prefill", "_decode"}  # by a step into a cache of the computing type, for the scales of another
SIZES = {"qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 256}}


Served = tuple[str, str, str, int, int, str]
SERVED: dict[Served, int] = {  # and how many kernels are compiled together at most
    ("gemma2", "int8", "int8", 80, 700, "eager"): 35,
    ("mixtral", "fp8", "bfloat16", 64, 64, "graphs"): 32,
    ("llama", "fp8", "fp8_e4m3", 80, 700, "graphs"): 24,
    ("llama", "int4", "bfloat16", 80, 700, "eager"): 33,
    ("gemma2", "int8", "int8", 80, 700, "graphs"): 35,
    ("qwen2_moe", "int4", "fp8_e4m3", 80, 700, "graphs"): 84,
}


def launches_of(served: list[Served], directory: Path) -> list[dict[str, list[str]]]:
    """Of each model that is served: by one process, which is slow to begin."""
    models = []
    for architecture, *flags in served:
        family, overrides = CASES[architecture]
        overrides = {**overrides, **SIZES.get(architecture, {}), "num_hidden_layers": 2}
        overrides["max_position_embeddings"] = first_launches.LENGTH
        model = save(make_hf(family, overrides).bfloat16(), directory / str(len(models)))
        models.append((str(model), *flags))
    found: list[dict[str, list[str]]] = printed(first_launches.__file__, json.dumps(models))
    return found


def is_compiled_at_start(found: dict[str, list[str]], most: int) -> None:
    """Nor are there more than there have to be, so that a start doesn't take longer than it has to."""
    assert most // 2 < len(found["together"]) <= most
    assert SAMPLERS <= set(found["start"]) <= SAMPLERS | MEASURED
    assert found["later"] == []


def test_no_kernel_is_compiled_while_serving(tmp_path: Path) -> None:
    """A dense model without graphs and a mixture with them, in two formats."""
    served = list(SERVED)[:2]
    for model, found in zip(served, launches_of(served, tmp_path), strict=True):
        is_compiled_at_start(found, SERVED[model])


@pytest.mark.slow
def test_no_kernel_is_compiled_while_any_other_is_served(tmp_path: Path) -> None:
    """The other formats, cache types and kinds of mixtures, in a minute."""
    served = list(SERVED)[2:]
    for model, found in zip(served, launches_of(served, tmp_path), strict=True):
        is_compiled_at_start(found, SERVED[model])


def test_steps_that_warm_up_write_nothing(fixtures: Path) -> None:
    device = Device(torch.device("cpu"), 0, lambda _: REFERENCE)
    model = load_model(EngineConfig(model=str(fixtures / "tiny"), dtype="float32"), device)
    limits = SchedulerConfig(num_blocks=4, block_size=16, max_model_len=40, max_num_seqs=5, max_num_batched_tokens=20)
    caches = kv_cache.allocate(model, limits.num_blocks, limits.block_size, torch.float32)
    for cache in caches:
        cache.key.uniform_()
        cache.value.uniform_()
    before = [(cache.key.clone(), cache.value.clone()) for cache in caches]
    run_steps(model, caches, limits)
    for cache, (key, value) in zip(caches, before, strict=True):
        assert torch.equal(cache.key, key)
        assert torch.equal(cache.value, value)
