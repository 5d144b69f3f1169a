"""Attention over the paged cache with a bias by distance, which T5 has in place of positions (arXiv 1910.10683, 2.1).

To the score of a query at position p and a key at k <= p, each head adds a number of its own for p - k. The body is
torch's own scaled_dot_product_attention, a sequence at a time, of keys and values that are taken out of their blocks.
Reference: `reference.distance_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.reference import gather, rope_and_cache
from octavo.kernels.attention.step import StepInputs


def biases_of(table: Tensor, step: StepInputs) -> list[Tensor]:
    """What a step's sequences add to their scores, [heads, n, L] of each: n new tokens, L in the cache.

    table  [heads, positions], by how far a key is behind its query, in the type of queries
    """
    sizes = step.query_starts.diff().tolist()
    found = []
    for size, length in zip(sizes, step.seq_lens.tolist(), strict=True):
        if size == 1:
            found.append(table[:, :length].flip(1).unsqueeze(1))
            continue
        behind = torch.arange(length - size, length)[:, None] - torch.arange(length)
        found.append(table[:, behind.clamp(min=0)].masked_fill(behind < 0, float("-inf")))
    return found


def distance_attention(
    qkv: Tensor, step: StepInputs, cache: LayerCache, shape: AttentionShape, biases: Sequence[Tensor]
) -> Tensor:
    """Write keys and values of qkv [T, 3 * heads * D] into the cache, and attend: [T, heads * D].

    biases: of each sequence, as `biases_of` has them; keys ahead of a query have -inf
    """
    q = rope_and_cache(qkv, step, cache, shape, None, None, None, 0.0)
    out = q.new_empty(q.shape)
    starts = step.query_starts.tolist()
    for s, length in enumerate(step.seq_lens.tolist()):
        begin = starts[s]
        end = starts[s + 1]
        table = step.block_tables[s, : -(-length // cache.block_size)].long()
        keys, values = (
            gather(store, scale, table, length, shape.head_dim, q.dtype)[None]
            for store, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
        )
        queries = q[begin:end].transpose(0, 1)[None]
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=biases[s][None], scale=shape.scale)
        out[begin:end] = attended[0].transpose(0, 1)
    return out.flatten(1)
