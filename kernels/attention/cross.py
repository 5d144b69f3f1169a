"""Attention of a decoder's tokens to the output of an encoder: every token sees all of its own sequence's source.

Keys and values of a source are computed once, when its sequence begins, and stand in a place of their own, [places,
heads, positions, D] of each layer: sources are of one length, so there is nothing to page. The body is torch's own
scaled_dot_product_attention, a sequence at a time: a batch of them would copy their keys and values side by side, which
takes as long as reading them. Reference: `reference.cross_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def cross_attention(
    q: Tensor, keys: Tensor, values: Tensor, starts: Sequence[int], places: Sequence[int], scale: float
) -> Tensor:
    """q [T, heads * D] of sequences whose tokens are starts[s] .. starts[s + 1] -> [T, heads * D].

    keys, values  [places, heads, positions, D]; sequence s attends to those of places[s]
    """
    _, heads, _, dim = keys.shape
    out = torch.empty_like(q)
    for place, begin, end in zip(places, starts[:-1], starts[1:], strict=True):
        queries = q[begin:end].view(1, end - begin, heads, dim).transpose(1, 2)
        attended = scaled_dot_product_attention(queries, keys[place, None], values[place, None], scale=scale)
        out[begin:end] = attended.transpose(1, 2).reshape(end - begin, -1)
    return out
