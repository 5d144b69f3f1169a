"""Attention of a decoder's tokens to the output of an encoder: every token sees all of its own sequence's source.

Keys and values of a source are computed once, when its sequence begins, and stand in a place of their own, [places,
heads, positions, D] of each layer, as far as the source is long: they don't grow, so there is nothing to page. The body
is torch's own scaled_dot_product_attention, a sequence at a time: a batch of them would copy their keys and values side
by side, which takes as long as reading them. Reference: `reference.cross_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Sources(NamedTuple):
    """Of the sequences of a step: sequence s owns tokens starts[s] .. starts[s + 1], and attends to lengths[s]
    positions of places[s].
    """

    starts: Sequence[int]
    places: Sequence[int]
    lengths: Sequence[int]


def cross_attention(q: Tensor, keys: Tensor, values: Tensor, sources: Sources, scale: float) -> Tensor:
    """q [T, heads * D] -> [T, heads * D]; keys, values [places, heads, positions, D]."""
    _, heads, _, dim = keys.shape
    out = torch.empty_like(q)
    starts, places, lengths = sources
    for place, length, begin, end in zip(places, lengths, starts[:-1], starts[1:], strict=True):
        queries = q[begin:end].view(1, end - begin, heads, dim).transpose(1, 2)
        seen = keys[place, None, :, :length]
        attended = scaled_dot_product_attention(queries, seen, values[place, None, :, :length], scale=scale)
        out[begin:end] = attended.transpose(1, 2).reshape(end - begin, -1)
    return out
