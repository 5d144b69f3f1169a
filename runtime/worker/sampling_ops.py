"""Which bodies change logits and draw tokens on a device, and the uniform numbers that they draw with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from octavo.kernels.sampling import reference

GREEDY_BELOW = 1e-5  # dividing logits by a lower temperature gives infinities; vLLM has the same limit


@dataclass(frozen=True)
class SamplingOps:
    """Each as octavo.kernels.sampling.reference defines it."""

    draw: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]] = reference.logprobs
    forbid: Callable[[Tensor, Tensor, Tensor], None] = reference.forbid
    add_biases: Callable[[Tensor, Tensor, Tensor, Tensor], None] = reference.add_biases
    punish: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = reference.punish


def select_sampling(device: torch.device, *, batch_invariant: bool = False) -> SamplingOps:
    """The bodies for a device. They are compiled at their first use, and cached.

    batch_invariant: what a row gives doesn't depend on the other rows, nor on what is asked about those.
    """
    if device.type == "cpu":
        from octavo.kernels.sampling import cpu

        return SamplingOps(cpu.draw, cpu.invariant_logprobs if batch_invariant else cpu.logprobs, cpu.forbid)
    from octavo.kernels.sampling.gpu import change
    from octavo.kernels.sampling.gpu.draw import draw

    return SamplingOps(
        draw,
        forbid=lambda *entries: change.forbid(*entries)(),
        add_biases=lambda *entries: change.add_biases(*entries)(),
        punish=lambda *entries: change.punish(*entries)(),
    )


def uniform(key: str, position: int) -> float:
    """A number in [0, 1), the same for the same key and position: a hash, so that no generator has to be kept."""
    digest = blake2b(f"{key}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
