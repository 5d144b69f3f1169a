"""A checkpoint's log probabilities of one prompt and its answer, by this machine's kernels, or an older processor's.

    python answered.py MODEL

prints those of a processor without AVX-512, whatever this machine has; NUMBA_CPU_NAME names which.
"""

from __future__ import annotations

import json
import sys
import time

from octavo.kernels.native import cpu_features
from octavo.runtime.config import EngineConfig
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.startup import load_engine


def log_probabilities(model: str) -> list[dict[str, float]]:
    """Of each token behind the first, those of the five likeliest tokens, by their ids."""
    config = EngineConfig(model=model, num_blocks=64, max_model_len=256, kv_cache_dtype="int8")
    engine, _ = load_engine(config, time.time())
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, prompt_logprobs=5)
    assert not engine.add(AddRequest("a", list(range(3, 40)), params, 0.0))
    (output,) = engine.step()
    entries = [*output.prompt_logprobs[1:], *output.logprobs]
    return [{str(t): p for t, p in zip(e.top_ids, e.top_logprobs, strict=True)} for e in entries]


if __name__ == "__main__":
    cpu_features.has_dot_products = lambda: False
    print(json.dumps(log_probabilities(sys.argv[1])))
