"""Which kernels a served model has Triton compile at start, and which later.

    python first_launches.py '[[DIR, DTYPE, KV, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, "eager" or "graphs"], ...]'

Needs no GPU: Triton's own dispatcher runs as on an H100, up to the compiler, which isn't called. What a kernel would
write is zeros. Prints names for each model: of kernels that are compiled together, that start meets one by one, and
that only requests met.
"""

from __future__ import annotations

import json
import random
import sys
import time
from multiprocessing import get_context
from typing import Any

import torch
from compiling import be_an_h100
from triton.runtime.jit import JITFunction

from octavo.runtime import startup
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.model import select_operators
from octavo.runtime.model.device import Device
from octavo.runtime.model.operators_gpu import make_ops
from octavo.runtime.worker import sampler
from octavo.runtime.worker.sampling_ops import select_sampling

LENGTH = 4000


def become_an_h100(seen: set[tuple[str, str]]) -> None:
    """From now on models take a GPU's bodies, whose launches end where one would be compiled, and are noted."""
    be_an_h100()
    JITFunction._do_compile = lambda self, key, *_: seen.add((self.__name__, key))
    select_operators.warm_up = lambda _: 0.0
    sampler.select_sampling = lambda _, **__: select_sampling(torch.device("cuda"))
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros


def some_request(number: int, rng: random.Random, vocab: int, longest: int) -> AddRequest:
    """Prompts short and, one in ten, long; greedy or drawn, some with all that changes logits."""
    length = rng.randrange(1, rng.choice((20, 300))) if number % 10 else rng.randrange(200, longest)
    settings: dict[str, Any] = {"temperature": rng.choice((0.0, 0.7)), "top_p": rng.choice((1.0, 0.9))}
    if rng.random() < 0.3:
        settings |= {"logit_bias": {1: 2.0, 2: -1.0}, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    if rng.random() < 0.2:
        settings |= {"logprobs": 2, "prompt_logprobs": 1}
    prompt = [rng.randrange(vocab) for _ in range(length)]
    return AddRequest(str(number), prompt, SamplingParams(max_tokens=rng.randrange(1, 20), **settings), 0.0)


def serve(engine: Engine, rng: random.Random) -> None:
    """Bursts of requests, of which few or many run at a time, to the last token; then a crowd."""
    longest = min(LENGTH - 20, 16 * engine.scheduler.config.max_num_batched_tokens)
    for burst in (1, 3, 30, 2, 90, 5):
        for number in range(burst):
            assert not engine.add(some_request(number, rng, engine.worker.model.vocab_size, longest))
        finish(engine)
    for number in range(engine.scheduler.config.max_num_seqs - 1):
        engine.add(AddRequest(str(number), [1], SamplingParams(max_tokens=8, temperature=0.0), 0.0))
    for _ in range(2):
        engine.step()
    engine.add(AddRequest("late", [1] * 30, SamplingParams(max_tokens=2), 0.0))  # a step may have room for one token
    finish(engine)


def finish(engine: Engine) -> None:
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error


def launches_of(model: tuple[str, str, str, int, int, str]) -> dict[str, list[str]]:
    """Serve one model, in a process that has served none: what has been compiled is the process's."""
    directory, dtype, kv, sequences, tokens, eager = model
    seen: set[tuple[str, str]] = set()
    become_an_h100(seen)
    config = EngineConfig(
        model=directory, dtype=dtype, kv_cache_dtype=kv, device="cpu", num_blocks=3000, max_model_len=LENGTH,  # type: ignore[arg-type]
        max_num_seqs=sequences, max_num_batched_tokens=tokens, enforce_eager=eager == "eager", num_threads=1,
    )  # fmt: skip
    together: set[tuple[str, str]] = set()
    compile_steps = startup.compile_steps

    def compile_and_note(*arguments: Any) -> None:
        compile_steps(*arguments)
        together.update(seen)

    startup.compile_steps = compile_and_note
    engine, _ = startup.load_engine(config, time.time(), Device(torch.device("cpu"), 90, make_ops))
    start = set(seen)
    with torch.inference_mode():
        serve(engine, random.Random(0))
    found = {"together": together, "start": start - together, "later": seen - start}
    return {when: sorted(name for name, _ in kernels) for when, kernels in found.items()}


def main() -> None:
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # one import for all
        print(json.dumps(pool.map(launches_of, json.loads(sys.argv[1]), chunksize=1)))


if __name__ == "__main__":
    main()
