"""What routing and the grouped forward over experts mean, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RunExpert = Callable[[int, Tensor], Tensor]  # (expert, x [n, H]) -> [n, H]


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


def grouped(x: Tensor, chosen: Tensor, weights: Tensor, num_experts: int, run: RunExpert) -> Tensor:
    """out[t] = sum over j of weights[t, j] * run(chosen[t, j], x[t]), summed in float32 in the order of j.

    Tokens are sorted by expert, so each expert that is needed runs once, on the rows that it has; a token's sum has
    the same order whatever else is in the batch. x [T, H], chosen and weights [T, top_k] -> [T, H] in x's type.
    """
    num_tokens, top_k = chosen.shape
    if num_tokens == 0:
        return torch.empty_like(x)
    if num_tokens == 1:
        results = torch.cat([run(e, x) for e in chosen[0].tolist()])
    else:
        order = chosen.flatten().argsort(stable=True)
        groups = torch.split(x[order // top_k], tokens_per_expert(chosen, num_experts).tolist())
        by_expert = torch.cat([run(e, rows) for e, rows in enumerate(groups) if rows.shape[0]])
        results = torch.empty_like(by_expert)
        results[order] = by_expert
    return torch.einsum("tjh,tj->th", results.view(num_tokens, top_k, -1).float(), weights).to(x.dtype)


def tokens_per_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, [E] int64."""
    return chosen.flatten().bincount(minlength=num_experts)
