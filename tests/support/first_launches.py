"""Which kernels a served model has Triton compile at start, and which later: `python first_launches.py DIR DTYPE KV`.

Needs no GPU: Triton's own dispatcher runs as on an H100, up to the compiler, which isn't called. What a kernel would
write is zeros. Prints names: of kernels that are compiled together, that start meets one by one, and that only requests
met.
"""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.runtime import kv_cache, sampler
from octavo.runtime.config import EngineConfig
from octavo.runtime.draw import select_sampling
from octavo.runtime.engine import Engine
from octavo.runtime.graphs import StepGraphs
from octavo.runtime.model import weights
from octavo.runtime.ops_gpu import make_ops
from octavo.runtime.request import AddRequest, SamplingParams
from octavo.runtime.scheduler import SchedulerConfig
from octavo.runtime.warm_up import compile_steps, run_requests, run_steps

SEQUENCES, TOKENS, LENGTH = 80, 700, 1500


def become_an_h100(seen: set[tuple[str, str]]) -> None:
    """From now on models take a GPU's bodies, whose launches end where one would be compiled, and are noted."""
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    )
    JITFunction._do_compile = lambda self, key, *_: seen.add((self.__name__, key))
    weights.select_ops = lambda _, dtype: make_ops(dtype)
    weights.capability = lambda _: 90
    sampler.select_sampling = lambda _: select_sampling(torch.device("cuda"))
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros


def some_request(number: int, rng: random.Random, vocab: int) -> AddRequest:
    """Prompts short and long, greedy or drawn, some with all that changes logits."""
    length = rng.choice((rng.randrange(1, 20), rng.randrange(1, 300), rng.randrange(200, LENGTH - 40)))
    settings: dict[str, Any] = {"temperature": rng.choice((0.0, 0.7)), "top_p": rng.choice((1.0, 0.9))}
    if rng.random() < 0.3:
        settings |= {"logit_bias": {1: 2.0, 2: -1.0}, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    if rng.random() < 0.2:
        settings |= {"logprobs": 2, "prompt_logprobs": 1}
    prompt = [rng.randrange(vocab) for _ in range(length)]
    return AddRequest(str(number), prompt, SamplingParams(max_tokens=rng.randrange(1, 40), **settings), 0.0)


def serve(engine: Engine, rng: random.Random) -> None:
    """Bursts of requests, of which few or many run at a time, to the last token."""
    for burst in (1, 3, 30, 2, 150, 5):
        for number in range(burst):
            assert engine.add(some_request(number, rng, engine.model.vocab_size)) is None
        while engine.scheduler.has_work:
            for output in engine.step():
                assert output.error is None, output.error


@torch.inference_mode()
def main() -> None:
    directory, dtype, kv = sys.argv[1:]
    torch.set_num_threads(1)
    seen: set[tuple[str, str]] = set()
    become_an_h100(seen)
    config = EngineConfig(
        model=directory, dtype=dtype, kv_cache_dtype=kv, device="cpu", block_size=16, max_model_len=LENGTH,  # type: ignore[arg-type]
        max_num_seqs=SEQUENCES, max_num_batched_tokens=TOKENS,
    )  # fmt: skip
    model = weights.load_model(config)
    compile_steps(model, config)
    together = set(seen)
    limits = SchedulerConfig(
        num_blocks=3000, block_size=16, max_model_len=LENGTH, max_num_seqs=SEQUENCES, max_num_batched_tokens=TOKENS
    )
    caches = kv_cache.allocate(model, limits.num_blocks, limits.block_size, kv_cache.DTYPES[kv])
    assert run_requests(model, caches, limits) is None
    run_steps(model, caches, limits)
    graphs = StepGraphs(model, caches, SEQUENCES, LENGTH) if model.can_be_captured else None
    start = set(seen)
    serve(Engine(model, caches, limits, graphs=graphs), random.Random(0))
    found = {"together": together, "start": start - together, "later": seen - start}
    print(json.dumps({when: sorted(name for name, _ in kernels) for when, kernels in found.items()}))


if __name__ == "__main__":
    main()
