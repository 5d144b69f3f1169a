"""The specification of changing logits, drawing a token from a row of them, and its log-probability, in plain torch.

Drawing is temperature, min-p, top-k, top-p, and one uniform number. A row's token depends on that row and its uniform
number alone, so that a seed gives the same text whatever else is in the batch. Therefore top-k and top-p are thresholds
on the weight, which keep ties together, instead of cuts in a sorted list. And the draw inverts the cumulative
distribution, in the order of the vocabulary, instead of comparing one random number for each token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 256  # tokens whose weights are summed before the cumulative sum: two short walks instead of a long one


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """One token for each row of logits [R, vocab] float32. The others are [R]; top_k 0, top_p 1 and min_p 0 are off.

    Weights are relative to the largest, which is 1. min-p is applied first, then top-k, then top-p to what is left.
    Each row must have a finite largest logit. uniforms are float64.
    """
    peak = logits.amax(dim=-1, keepdim=True)
    weights = ((logits - peak) / temperature.unsqueeze(1)).exp_()
    truncated = ((top_k > 0) | (top_p < 1) | (min_p > 0)).nonzero().squeeze(1)
    if len(truncated):
        rows = weights if len(truncated) == len(weights) else weights[truncated]
        least = least_weight(rows, top_k[truncated], top_p[truncated], min_p[truncated])
        weights[truncated] = rows * (rows >= least.unsqueeze(1))
    return _invert(weights, uniforms)


def least_weight(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest weight that may be drawn, [R], for weights [R, vocab] whose largest is 1 in each row."""
    vocab = weights.shape[1]
    least = min_p.clone()
    top_k = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k)
    asks = ((top_k < vocab) | (top_p < 1)).nonzero().squeeze(1)
    size = 64
    while len(asks):
        size = min(size, vocab)
        asked = weights if len(asks) == len(weights) else weights[asks]
        highest = asked.topk(size, dim=-1).values
        found, done = _cut(asked, highest, least[asks], top_k[asks], top_p[asks])
        least[asks[done]] = found[done]
        asks = asks[~done]
        size *= 8
    return least


def _cut(weights: Tensor, highest: Tensor, least: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's cut-off, as far as its `highest` weights determine it, and whether they do."""
    size = highest.shape[1]
    vocab = weights.shape[1]
    k_known = (top_k <= size) | (top_k == vocab)
    kth = highest.gather(1, (top_k.clamp(max=size) - 1).unsqueeze(1)).squeeze(1)
    cut = torch.where(top_k < vocab, torch.maximum(least, kth), least)
    kept = weights >= cut.unsqueeze(1)
    total = torch.where(kept, weights, 0).sum(dim=-1, dtype=torch.float64)
    mass = torch.where(highest >= cut.unsqueeze(1), highest, 0).cumsum(dim=-1, dtype=torch.float64)
    wanted = top_p.double() * total
    index = (mass < wanted.unsqueeze(1)).sum(dim=-1)  # the first at which the mass is reached
    p_known = (index < size) | (top_p >= 1)
    nucleus = highest.gather(1, index.clamp(max=size - 1).unsqueeze(1)).squeeze(1)
    if size == vocab:  # rounding may leave the whole mass a hair short
        p_known = torch.ones_like(p_known)
        nucleus = torch.where(index < size, nucleus, cut)
    return torch.where(top_p < 1, torch.maximum(cut, nucleus), cut), k_known & p_known


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token at which the cumulative weight exceeds uniform * total, for each row; never one of weight 0."""
    vocab = weights.shape[1]
    chunks = F.pad(weights, (0, -vocab % _CHUNK)).view(len(weights), -1, _CHUNK)
    ends = chunks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniforms.unsqueeze(1) * ends[:, -1:]
    chunk = _first_above(ends, target)
    before = torch.where(chunk > 0, ends.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = chunks.take_along_dim(chunk.unsqueeze(2), dim=1).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    offset = _first_above(inside, (target - before).clamp(min=0.0))
    return (chunk * _CHUNK + offset).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [R, 1] of the first entry above target [R, 1]; if rounding leaves none, of the last one that grew."""
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.searchsorted(cumulative, target, right=True).minimum(last)


def logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of each row [R, vocab] at `chosen` [R], its rank (1 is best), ids and values of the top `count`.

    Returns float32 [R], int64 [R], int64 [R, count], float32 [R, count]. Equal logits share the better rank.
    """
    norm = logits.logsumexp(dim=-1, keepdim=True)
    picked = logits.gather(1, chosen.unsqueeze(1))
    ranks = (logits > picked).sum(dim=-1) + 1
    top = logits.topk(count, dim=-1)
    return (picked - norm).squeeze(1), ranks, top.indices, top.values - norm


def forbid(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Set what a grammar does not allow to -inf, in place.

    rows [R] int64 of logits [L, vocab], each once; bits [R, ceil(vocab / 32)] int32: bit j of word i is 1 where row
    rows[r] may go on with token 32 i + j (llguidance's masks).
    """
    allowed = (bits.unsqueeze(-1) >> torch.arange(32, device=bits.device, dtype=torch.int32)) & 1
    allowed = allowed.flatten(1)[:, : logits.shape[1]].bool()
    logits[rows] = torch.where(allowed, logits[rows], float("-inf"))


def add_biases(logits: Tensor, rows: Tensor, tokens: Tensor, biases: Tensor) -> None:
    """logits[rows[i], tokens[i]] += biases[i] in place, for distinct pairs; -inf forbids a token."""
    logits[rows, tokens] += biases


def punish(
    logits: Tensor,
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Apply penalties to logits [R, vocab], in place, at the distinct pairs (rows[i], tokens[i]) that have occurred.

    counts [n] is how often the token stands in the row's output, 0 if only in its prompt. The penalties are [R]; 1, 0
    and 0 change nothing. A positive logit is divided by repetition, any other one is multiplied by it.
    """
    values = logits[rows, tokens]
    values = torch.where(values > 0, values / repetition[rows], values * repetition[rows])
    logits[rows, tokens] = values - frequency[rows] * counts - presence[rows] * (counts > 0)
