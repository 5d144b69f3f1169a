"""A head with its cache, which has as many blocks as the model's, and some of its own behind them."""

from __future__ import annotations

import torch

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.layers import Attention
from octavo.runtime.model.model import Model
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.speculation.draft_choice import DraftChoice
from octavo.runtime.speculation.head_drafts import HeadDrafts, OwnBlocks
from octavo.runtime.speculation.head_files import load_head
from octavo.runtime.speculation.heads import Head
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.device import free_memory
from octavo.runtime.worker.worker import Worker


def load_head_drafts(config: EngineConfig, worker: Worker, limits: SchedulerConfig, notes: list[str]) -> HeadDrafts:
    """The head of a configuration that names one, for a worker's model; notes get lines about it. Raises ValueError."""
    asked = config.speculative_config
    assert asked is not None
    model = worker.model
    head = load_head(config, model, limits, notes)
    assert isinstance(head.layer.attention, Attention)  # `head_files` reads no others
    shape = head.layer.attention.shape
    own = OwnBlocks.behind(limits.num_blocks, limits.block_size, asked.num_speculative_tokens)
    num_blocks = own.of(limits.max_num_seqs).start
    size = (num_blocks, shape.num_kv_heads, limits.block_size, shape.head_dim)
    num_bytes = 2 * torch.Size(size).numel() * model.dtype.itemsize
    free = free_memory(model.device)
    if num_bytes > free:
        raise ValueError(
            f"--speculative-config: the head's part of the cache takes {num_bytes / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB of memory are free; a smaller --kv-cache-memory-bytes works"
        )
    one = torch.ones(shape.num_kv_heads, device=model.device)
    keys, values = (kv_cache.zeros(size, model.dtype, model.device) for _ in range(2))
    cache = LayerCache(keys, values, one, one)
    worker.draft_caches = [cache]
    _run_once(head, cache, own, model)
    choice = DraftChoice(model.vocab_size, config.seed, model.device, head.token_ids)
    states = worker.keep_hidden(head.layers)
    read = ", ".join(str(layer) for layer in head.layers)
    notes.append(
        f"head {asked.model or config.model}: {asked.method}, {head.weight_bytes / 1e6:,.0f} MB for each draft, reads "
        f"what layer{'s' * (len(head.layers) > 1)} {read} of the model say{'s' * (len(head.layers) == 1)}; its part of "
        f"the cache takes up to {num_bytes / 1e6:,.0f} MB"
    )
    return HeadDrafts(head, states, cache, choice, own, limits.max_model_len)


@torch.inference_mode()
def _run_once(head: Head, cache: LayerCache, own: OwnBlocks, model: Model) -> None:
    """What compiles at first use, of several tokens and of one. Raises ValueError for weights that aren't numbers."""
    states = torch.zeros((2, len(head.layers) * model.hidden_size), dtype=model.dtype, device=model.device)
    hidden = head.hidden_of(states)
    for size in (2, 1):
        step = StepInputs.prefill([2], cache.block_size, sizes=[size], tables=[list(own.of(0))])
        logits = head.logits(head.forward(hidden[:size], step, cache).normed)
    if not bool(logits.isfinite().all()):
        raise ValueError("--speculative-config: what the head says are no finite numbers: its weights are broken")
