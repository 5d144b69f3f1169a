"""A processor without AVX-512: what is compiled for it must compile, and answer as this machine's kernels do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

FIXTURES = Path(__file__).parents[1] / "fixtures"
PROGRAM = """
import json, sys, time
from octavo.kernels.native import cpu_features
if sys.argv[2] == "old":
    cpu_features.has_dot_products = lambda: False
from octavo.runtime.config import EngineConfig
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.startup import load_engine
config = EngineConfig(model=sys.argv[1], num_blocks=64, max_model_len=256, kv_cache_dtype="int8")
engine, ready = load_engine(config, time.time())
params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, prompt_logprobs=5)
assert not engine.add(AddRequest("a", list(range(3, 40)), params, 0.0))
(output,) = engine.step()
entries = [*output.prompt_logprobs[1:], *output.logprobs]
print(json.dumps([{t: p for t, p in zip(e.top_ids, e.top_logprobs)} for e in entries]))
"""


def log_probabilities(model: Path, processor: str, environment: dict[str, str]) -> list[dict[str, float]]:
    command = [sys.executable, "-c", PROGRAM, str(model), processor]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    answer: list[dict[str, float]] = json.loads(result.stdout)
    return answer


def test_the_engine_runs_on_a_processor_without_avx512(tmp_path: Path) -> None:
    model = FIXTURES / "tiny--llmc-w8a8"
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    old = log_probabilities(model, "old", haswell)
    new = log_probabilities(model, "new", {})
    assert len(old) == len(new) == 37
    both = [(a[t], b[t]) for a, b in zip(old, new, strict=True) for t in a.keys() & b.keys()]
    assert len(both) > 4 * 37
    # the old one rounds weights and inputs to bf16: hundredths of a nat in two layers; a wrong kernel makes whole ones
    assert sum(abs(a - b) for a, b in both) / len(both) < 0.05
