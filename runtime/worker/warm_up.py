"""Steps of every kind, run once at start, so that what compiles at first use doesn't do so while requests wait.

Triton compiles a kernel anew for other block sizes, and for an argument that is 1 or a multiple of 16. Block sizes
depend on the number of tokens, of pairs of a token and an expert, or of such pairs per expert, and change at powers of
two. The size of lists in a kernel depends on the number of sequences, if the longest context needs lists. All of this
depends on a step's sizes alone, so the steps that are run here hold nothing, as a graph's padding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.attention.token_rows import CacheType
from octavo.kernels.linear_attention.states import Cache
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, PoolingParams, SamplingParams
from octavo.runtime.model.model import Model
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.source_messages import AudioSource, TextSource
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.worker import Worker

if TYPE_CHECKING:
    from octavo.runtime.parallel.followers import Followers

EVERYTHING = SamplingParams(
    max_tokens=2,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    presence_penalty=0.1,
    logit_bias={0: -1.0},
    logprobs=1,
    prompt_logprobs=1,
)
"""What can be asked of a sampler."""
GREEDY = SamplingParams(max_tokens=2, temperature=0.0)


def run_requests(
    model: Model, caches: list[Cache], limits: SchedulerConfig, followers: Followers | None = None
) -> str | None:
    """Answer two requests with two tokens, greedily and with all that a sampler can do; returns what was wrong."""
    engine = Engine(Worker(model, caches, limits), limits, followers=followers)
    if model.pooler is not None:
        return _run_pooled(engine, model)
    length = min(64, limits.max_model_len - 2, limits.num_blocks * limits.block_size // 2 - 1)
    prompt = [token % model.vocab_size for token in range(1, max(1, length) + 1)]
    source = model.source
    features = bytes(source.num_bytes) if isinstance(source, AudioSource) else b""
    text = _text(prompt, source) if isinstance(source, TextSource) else []
    for name, params in {"greedy": GREEDY, "sampled": EVERYTHING}.items():
        engine.add(AddRequest(f"warm-up, {name}", prompt, params, 0.0, features=features, source_ids=text))
    problem = None
    while engine.has_work:
        for output in engine.step():
            problem = problem or output.error
    return problem


def _text(prompt: list[int], source: TextSource) -> list[int]:
    """What an encoder can read of a prompt, or at least of token 0 before it."""
    return [token for token in (0, *prompt) if token != source.padding][: source.positions]


def _run_pooled(engine: Engine, model: Model) -> str | None:
    """Answer two pooled requests of different lengths."""
    assert model.pooler is not None
    longest = engine.scheduler.config.max_model_len
    for length in {min(8, longest), min(64, longest)}:
        params = PoolingParams(model.pooler.tasks[0])
        tokens = [token % model.vocab_size for token in range(1, length + 1)]
        engine.add(AddRequest(f"warm-up, {length}", tokens, GREEDY, 0.0, pooling=params))
    problem = None
    while engine.has_work:
        for output in engine.step():
            problem = problem or output.error
    return problem


def compile_steps(model: Model, limits: SchedulerConfig, cache_dtype: CacheType) -> None:
    """Have the kernels of `run_steps` compiled, on all cores at once, before there is a cache but of one block."""
    from octavo.kernels.launching.launch import compiled_together

    with compiled_together(torch.get_num_threads()):
        run_steps(model, kv_cache.allocate(model, 1, limits.block_size, cache_dtype), limits)


def run_steps(model: Model, caches: list[Cache], limits: SchedulerConfig) -> None:
    """Run steps of all sizes, so that the kernels of any later step have been compiled."""
    num_groups = 1 + max(cache.group for cache in caches)
    for sizes, rows in _steps(limits, _pairs(model)):
        step = StepInputs.empty(sizes, limits.max_model_len, limits.block_size, num_groups)
        if rows:
            step = replace(step, logits_index=torch.arange(rows))
        model.forward(step.to(model.device), caches)


def _steps(limits: SchedulerConfig, pairs: set[float]) -> Iterator[tuple[list[int], int]]:
    """Tokens of each sequence, and of how many tokens there are logits (0: the last of each).

    Decode steps, steps with a prompt among them, and prompts alone, whose log-probabilities are wanted.
    """
    most = limits.max_num_batched_tokens
    for sequences in _ends_of_ranges(min(limits.max_num_seqs, most) + 1):  # one of a graph's for what fills it up
        yield [1] * sequences, 0
        yield [2] + [1] * (sequences - 1), 0
    for tokens in _ends_of_ranges(most, *pairs):
        yield [tokens], min(tokens, limits.max_prompt_logits + limits.max_num_seqs)


def _pairs(model: Model) -> set[float]:
    """Multipliers from a number of tokens to the pairs that they make with experts, and to the pairs per expert."""
    return {factor for mixture in model.mixtures for factor in (mixture.pairs, mixture.pairs / mixture.num_experts)}


def _ends_of_ranges(most: int, *per_token: float) -> list[int]:
    """Both sides of each point, up to the most, at which one of these multiples passes a power of two.

    And from each range between two points a multiple of 16, and a number that isn't one.
    """
    powers = [2**k for k in range(most.bit_length())]
    ends = {int(2**k / each) + more for each in per_token for k in range(most.bit_length() + 8) for more in (0, 1)}
    own = {most, max(most // 16 * 16, 1), *powers, *(power + 1 for power in powers)}
    return sorted(number for number in own | ends if 1 <= number <= most)
