"""Which requests can't ever run, and why."""

from __future__ import annotations

from collections.abc import Callable

from octavo.runtime.messages import AddRequest
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.vision.recipes import tokens_at_once


def refusal_of(request: AddRequest, config: SchedulerConfig, most_blocks: Callable[[int, int], int]) -> str | None:
    """None for a request that can. most_blocks: how many blocks so many tokens may need, of which so many at once."""
    num_prompt = request.prompt_length
    if num_prompt == 0:
        return "the prompt is empty: at least one token is needed"
    if request.pooling is not None and num_prompt > config.max_model_len:
        return f"the prompt has {num_prompt} tokens; max_model_len is {config.max_model_len}"
    if request.pooling is None and num_prompt >= config.max_model_len:
        return (
            f"the prompt has {num_prompt} tokens; with max_model_len {config.max_model_len} it may have "
            f"{config.max_model_len - 1} at most, so that one can follow"
        )
    most = min(num_prompt + request.params.max_tokens, config.max_model_len) - 1  # the last one is never computed
    if request.pooling is not None:
        most = num_prompt
    at_once = tokens_at_once(request.images)
    if at_once > config.max_num_batched_tokens:
        return (
            f"{at_once} tokens of the prompt see each other, and are computed in one step, which has "
            f"{config.max_num_batched_tokens} at most (--max-num-batched-tokens)"
        )
    needed = most_blocks(most, at_once)
    if needed > config.num_blocks:
        return (
            f"the request may need {most} tokens of KV cache, {needed} blocks of {config.block_size}; the cache "
            f"has {config.num_blocks} blocks: ask for fewer tokens or serve with a larger cache"
        )
    return None
