"""What routing and the grouped forward over experts mean, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RunExpert = Callable[[int, Tensor, Tensor], Tensor]  # (expert, x [n, H], tokens [n] int64) -> [n, H]


def route(x: Tensor, router: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The top_k experts of each token, the likeliest first.

    x [T, H], router [E, H] float32 -> chosen [T, top_k] int64, weights [T, top_k] float32: the softmax over all experts
    of x . router, divided by their sum when `normalize`. In float32 whatever x's type: bf16 logits tie.
    """
    probabilities = torch.softmax(F.linear(x.float(), router), dim=-1)
    weights, chosen = probabilities.topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return chosen, weights


def grouped(
    x: Tensor, chosen: Tensor, weights: Tensor, num_local: int, run: RunExpert, first_expert: int = 0
) -> Tensor:
    """out[t] = sum over j of weights[t, j] * run(chosen[t, j] - first_expert, x[t], t), summed in float32 in j's order.

    Experts first_expert .. first_expert + num_local - 1 are here. Pairs of a token and another expert are another
    rank's: they are dropped before any expert runs, and add nothing. Tokens are sorted by expert, so each expert that
    is needed runs once, on the rows that it has; a token's sum has the same order whatever else is in the batch.

    x [T, H], chosen and weights [T, top_k] -> [T, H] in the type that run returns; in x's where no expert runs.
    """
    if chosen.shape[0] == 1:
        return _of_one_token(x, chosen, weights, num_local, run, first_expert)
    num_tokens, top_k = chosen.shape
    counts = tokens_per_expert(chosen, first_expert + num_local).tolist()
    begin = sum(counts[:first_expert])
    own = counts[first_expert : first_expert + num_local]
    num_pairs = sum(own)
    if num_pairs == 0:
        return torch.zeros_like(x)
    order = chosen.flatten().argsort(stable=True)[begin : begin + num_pairs]
    tokens = order // top_k
    groups = zip(torch.split(x[tokens], own), torch.split(tokens, own), strict=True)
    by_expert = torch.cat([run(e, rows, some) for e, (rows, some) in enumerate(groups) if rows.shape[0]])
    shape = (num_tokens * top_k, by_expert.shape[1])
    results = by_expert.new_empty(shape) if num_pairs == chosen.numel() else by_expert.new_zeros(shape)
    results[order] = by_expert
    return _weighted_sum(results.view(num_tokens, top_k, -1), weights)


def _of_one_token(
    x: Tensor, chosen: Tensor, weights: Tensor, num_local: int, run: RunExpert, first_expert: int
) -> Tensor:
    """`grouped` where there is nothing to sort."""
    local = [expert - first_expert for expert in chosen[0].tolist()]
    kept = [j for j, expert in enumerate(local) if 0 <= expert < num_local]
    if not kept:
        return torch.zeros_like(x)
    token = chosen.new_zeros(1)
    results = torch.cat([run(local[j], x, token) for j in kept])
    return _weighted_sum(results.unsqueeze(0), weights if len(kept) == len(local) else weights[:, kept])


def _weighted_sum(results: Tensor, weights: Tensor) -> Tensor:
    """[T, J, H] and [T, J] -> [T, H] in the results' type, added in float32."""
    return torch.einsum("tjh,tj->th", results.float(), weights).to(results.dtype)


def tokens_per_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, [E] int64."""
    return chosen.flatten().bincount(minlength=num_experts)
