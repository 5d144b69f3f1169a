"""Kernels are compiled while a server starts, and never while it serves: asked of Triton's own dispatcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import first_launches
import pytest
from hf_oracle import CASES, make_hf, save

SIZES = {"qwen3_moe": {"moe_intermediate_size": 64}}  # of whole groups


@pytest.mark.parametrize(
    ("architecture", "dtype", "kv"),
    [
        ("llama", "fp8", "fp8_e4m3"),
        ("llama", "int4", "bfloat16"),
        ("gemma2", "int8", "int8"),
        ("mixtral", "fp8", "bfloat16"),
        ("qwen3_moe", "int4", "fp8_e4m3"),
    ],
)
def test_no_kernel_is_compiled_while_serving(architecture: str, dtype: str, kv: str, tmp_path: Path) -> None:
    family, overrides = CASES[architecture]
    overrides = {
        **overrides,
        **SIZES.get(architecture, {}),
        "num_hidden_layers": 2,
        "max_position_embeddings": first_launches.LENGTH,
    }
    directory = save(make_hf(family, overrides).bfloat16(), tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(first_launches.__file__)), str(directory), dtype, kv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["together"]) > 20
    assert set(found["start"]) == {"_add_biases", "_choose", "_masses", "_peaks", "_punish"}  # a sampler's
    assert found["later"] == []
