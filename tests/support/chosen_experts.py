"""The experts that a router chooses, in float64, and what a kernel's weights of them may be off by."""

from __future__ import annotations

import math

from torch import Tensor


def additions(hidden: int) -> int:
    """How many an exact product goes through in `moe.gpu.router`: of a step of 128, of a part's steps, of 16 parts."""
    return min(hidden, 128) + -(-hidden // 128) + 16


def errors(x: Tensor, router: Tensor) -> float:
    """What the logits x [T, H] @ router [E, H]^T, and the logarithm of what their exp is, may be off by.

    An addition in float32 by 2^-23 of the sum of the sizes (a tensor core cuts off), of however few columns there are.
    An exp by 2^-21 of itself, and by 2^-24 of its argument.
    """
    sizes = x.double().abs() @ router.double().abs().T
    return float((additions(x.shape[1]) * 2**-23 + 2**-23) * sizes.max() + 2**-21)


def clear(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    """Of each token whether its first top_k + 1 experts differ by more: there is but one right choice."""
    ordered = (x.double() @ router.double().T).sort(dim=1, descending=True)[0]
    return (ordered[:, :top_k] - ordered[:, 1 : top_k + 1] > 2 * errors(x, router)).all(1)


def routed(x: Tensor, router: Tensor, top_k: int, *, normalize: bool) -> tuple[Tensor, Tensor, float]:
    """The experts of tokens that are clear, their weights, both [T, top_k], and the share of it that one is off by.

    A weight is an exp over a sum of them: one is too large, the others too small; two divisions and a sum.
    """
    assert clear(x, router, top_k).all()
    experts = (x.double() @ router.double().T).sort(dim=1, descending=True, stable=True)[1][:, :top_k]
    weights = (x.double() @ router.double().T).softmax(1).gather(1, experts)
    if normalize:
        weights /= weights.sum(1, keepdim=True)
    return experts, weights, math.expm1(2 * errors(x, router)) + (len(router) + 4) * 2**-24
