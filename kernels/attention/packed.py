"""Attention over whole sequences that stand packed one after another, without a cache: what encoders need.

Every token sees all tokens of its own sequence, or those within a window on both sides of it. Sequences of equal length
that stand side by side are computed at once; nothing is padded. Reference: `reference.packed_attention`. The body is
torch's own scaled_dot_product_attention, which computes in blocks and never holds a whole matrix of scores, but under
a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK = 256  # tokens whose windows are cut out of a long sequence together


class Run(NamedTuple):
    """`num_texts` texts of `length` tokens each, one after another from token `begin` on."""

    begin: int
    num_texts: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedShape:
    """Heads of one layer's attention. window: how far a token sees on either side; None: all of its sequence."""

    num_heads: int
    head_dim: int
    scale: float
    window: int | None = None


def runs_of(lengths: Sequence[int]) -> list[Run]:
    """The runs of neighbors of equal length, of sequences of these lengths in order."""
    runs = []
    begin = 0
    for length, alike in groupby(lengths):
        count = len(list(alike))
        runs.append(Run(begin, count, length))
        begin += count * length
    return runs


def packed_attention(
    qkv: Tensor, runs: Sequence[Run], shape: PackedShape, biases: Sequence[Tensor] | None = None
) -> Tensor:
    """qkv [T, 3 * heads * D], queries, keys and values side by side, -> [T, heads * D].

    biases: of each run, what is added to its scores [heads, length, length], in qkv's type; None: nothing.
    """
    outputs = []
    for i, run in enumerate(runs):
        part = qkv[run.begin : run.begin + run.num_texts * run.length]
        q, k, v = part.view(run.num_texts, run.length, 3, shape.num_heads, shape.head_dim).permute(2, 0, 3, 1, 4)
        if shape.window is not None and run.length > shape.window + 1:
            out = _in_windows(q, k, v, shape.window, shape.scale)
        else:
            bias = None if biases is None else biases[i]
            out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=shape.scale)
        outputs.append(out.transpose(1, 2).reshape(part.shape[0], -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _in_windows(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """q, k, v [B, heads, L, D] -> the same shape; scores of a block of queries are computed with what it sees alone."""
    length = q.shape[2]
    outputs = []
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        first = max(0, begin - window)
        last = min(length, end + window)
        distance = torch.arange(begin, end)[:, None] - torch.arange(first, last)
        seen = (distance.abs() <= window).to(q.device)
        keys = k[:, :, first:last]
        values = v[:, :, first:last]
        outputs.append(scaled_dot_product_attention(q[:, :, begin:end], keys, values, attn_mask=seen, scale=scale))
    return torch.cat(outputs, dim=2)
