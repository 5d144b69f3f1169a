"""What routing and the grouped forward over experts mean, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

RunExpert = Callable[[int, Tensor, Tensor], Tensor]  # (expert, x [n, H], tokens [n] int64) -> [n, H]


@dataclass(frozen=True, slots=True)
class Routing:
    """How the experts of a token are chosen and weighted, of its logits [E].

    top_k        experts that a token goes to
    normalize    the chosen experts' scores are divided by their sum
    scores       softmax: over all experts. sigmoid: of each one by itself
    factor       what weights are multiplied by in the end
    num_groups   of equally many experts, side by side; a token's experts are of its best top_groups
    group_score  best: that of a group's best expert. best_two: the sum of those of its best two
    weighs       what weights are multiplied by: experts' outputs, or their inputs
    """

    top_k: int
    normalize: bool
    scores: Literal["softmax", "sigmoid"] = "softmax"
    factor: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best_two"] = "best_two"
    weighs: Literal["outputs", "inputs"] = "outputs"


@dataclass(frozen=True, slots=True)
class Router:
    """A layer's router: its weights, all float32, and what is made of its logits.

    weight      [E, H]
    bias        [E], added to logits; None: there is none
    correction  [E], added to scores for the choice of experts, and not to their weights; None: there is none
    scale       [E], what experts' weights are multiplied by; None: nothing
    """

    weight: Tensor
    routing: Routing
    bias: Tensor | None = None
    correction: Tensor | None = None
    scale: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield from (t for t in (self.weight, self.bias, self.correction, self.scale) if t is not None)


def route(x: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """The experts of each token, the best first, and their weights.

    x [T, H] -> chosen [T, top_k] int64, weights [T, top_k] float32. In float32 whatever x's type: bf16 logits tie.
    """
    chosen, weights, _ = route_scored(x, router)
    return chosen, weights


def route_scored(x: Tensor, router: Router) -> tuple[Tensor, Tensor, Tensor]:
    """As `route`, and the scores of all experts, [T, E] float32."""
    routing = router.routing
    logits = F.linear(x.float(), router.weight, router.bias)
    scores = torch.softmax(logits, dim=-1) if routing.scores == "softmax" else torch.sigmoid(logits)
    choice = scores
    if router.correction is not None:
        choice = scores + router.correction
    elif routing.scores == "sigmoid":
        choice = logits  # in the same order, and sigmoids of large ones are all 1
    if routing.top_groups < routing.num_groups:
        choice = _of_best_groups(choice, routing)
    best, chosen = choice.topk(routing.top_k, dim=-1)
    weights = best if choice is scores else scores.gather(-1, chosen)
    if routing.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if router.scale is not None:
        weights = weights * router.scale[chosen]
    return chosen, weights if routing.factor == 1.0 else weights * routing.factor, scores


def weigh(x: Tensor, weights: Tensor) -> Tensor:
    """x [n, H] times weights [n, 1] float32, in x's type."""
    return (x.float() * weights).to(x.dtype)


def _of_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    """Scores [T, E] with those of all other groups at -infinity."""
    groups = choice.view(len(choice), routing.num_groups, choice.shape[1] // routing.num_groups)
    counted = 1 if routing.group_score == "best" else 2
    totals = groups.topk(counted, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(totals, dtype=torch.bool).scatter(1, totals.topk(routing.top_groups, dim=-1).indices, True)
    return groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)


def grouped(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    num_local: int,
    run: RunExpert,
    first_expert: int = 0,
    *,
    weighs: Literal["outputs", "inputs"] = "outputs",
) -> Tensor:
    """out[t] = sum over j of weights[t, j] * run(chosen[t, j] - first_expert, x[t], t), summed in float32 in j's order.

    With `weighs` inputs, it is the sum of run(chosen[t, j] - first_expert, weights[t, j] * x[t], t).
    Experts first_expert .. first_expert + num_local - 1 are here. Pairs of a token and another expert are another
    rank's: they are dropped before any expert runs, and add nothing. Tokens are sorted by expert, so each expert that
    is needed runs once, on the rows that it has; a token's sum has the same order whatever else is in the batch.

    x [T, H], chosen and weights [T, top_k] -> [T, H] in the type that run returns; in x's where no expert runs.
    """
    of_inputs = weights if weighs == "inputs" else None
    if of_inputs is not None:
        weights = torch.ones_like(weights)
    if chosen.shape[0] == 1:
        return _of_one_token(x, chosen, weights, num_local, run, first_expert, of_inputs)
    num_tokens, top_k = chosen.shape
    counts = tokens_per_expert(chosen, first_expert + num_local).tolist()
    begin = sum(counts[:first_expert])
    own = counts[first_expert : first_expert + num_local]
    num_pairs = sum(own)
    if num_pairs == 0:
        return torch.zeros_like(x)
    order = chosen.flatten().argsort(stable=True)[begin : begin + num_pairs]
    tokens = order // top_k
    rows = x[tokens] if of_inputs is None else weigh(x[tokens], of_inputs.flatten()[order].unsqueeze(1))
    groups = zip(torch.split(rows, own), torch.split(tokens, own), strict=True)
    by_expert = torch.cat([run(e, part, some) for e, (part, some) in enumerate(groups) if part.shape[0]])
    shape = (num_tokens * top_k, by_expert.shape[1])
    results = by_expert.new_empty(shape) if num_pairs == chosen.numel() else by_expert.new_zeros(shape)
    results[order] = by_expert
    return _weighted_sum(results.view(num_tokens, top_k, -1), weights)


def _of_one_token(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    num_local: int,
    run: RunExpert,
    first_expert: int,
    of_inputs: Tensor | None,
) -> Tensor:
    """`grouped` where there is nothing to sort. of_inputs: what inputs are multiplied by; None: nothing."""
    local = [expert - first_expert for expert in chosen[0].tolist()]
    kept = [j for j, expert in enumerate(local) if 0 <= expert < num_local]
    if not kept:
        return torch.zeros_like(x)
    token = chosen.new_zeros(1)
    inputs = (x if of_inputs is None else weigh(x, of_inputs[:, j : j + 1]) for j in kept)
    results = torch.cat([run(local[j], row, token) for j, row in zip(kept, inputs, strict=True)])
    return _weighted_sum(results.unsqueeze(0), weights if len(kept) == len(local) else weights[:, kept])


def _weighted_sum(results: Tensor, weights: Tensor) -> Tensor:
    """[T, J, H] and [T, J] -> [T, H] in the results' type, added in float32."""
    return torch.einsum("tjh,tj->th", results.float(), weights).to(results.dtype)


def tokens_per_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, [E] int64."""
    return chosen.flatten().bincount(minlength=num_experts)
