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


SERVED = [
    ("llama", "fp8", "fp8_e4m3", 80, 700, "graphs"),
    ("llama", "int4", "bfloat16", 80, 700, "eager"),
    ("gemma2", "int8", "int8", 80, 700, "graphs"),
    ("mixtral", "fp8", "bfloat16", 64, 64, "graphs"),
    ("qwen2_moe", "int4", "fp8_e4m3", 80, 700, "graphs"),
]
MOST = (24, 33, 35, 32, 84)  # kernels that are compiled together


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """Of each model that is served."""
    models = []
    for architecture, *flags in SERVED:
        family, overrides = CASES[architecture]
        overrides = {**overrides, **SIZES.get(architecture, {}), "num_hidden_layers": 2}
        overrides["max_position_embeddings"] = first_launches.LENGTH
        directory = save(make_hf(family, overrides).bfloat16(), tmp_path_factory.mktemp("served") / "model")
        models.append((str(directory), *flags))
    found: list[dict[str, list[str]]] = printed(first_launches.__file__, json.dumps(models))
    return found


@pytest.mark.parametrize("number", range(len(SERVED)), ids=["-".join(map(str, served)) for served in SERVED])
def test_no_kernel_is_compiled_while_serving(launches: list[dict[str, list[str]]], number: int) -> None:
    """Nor are there more than there have to be, so that a start doesn't take longer than it has to."""
    found = launches[number]
    assert MOST[number] // 2 < len(found["together"]) <= MOST[number]
    assert SAMPLERS <= set(found["start"]) <= SAMPLERS | MEASURED
    assert found["later"] == []


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
