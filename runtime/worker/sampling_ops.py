"""Which bodies change logits and draw tokens on a device, and the uniform numbers that they draw with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from octavo.kernels.sampling import reference
from octavo.runtime.scheduling.sequence import Sequence

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


def draw_rows(
    ops: SamplingOps, seed: int, logits: Tensor, rows: list[int], drawing: list[Sequence], num_outputs: list[int]
) -> list[int]:
    """A token for each of these sequences, of its row of logits [L, vocab], by its own temperature, top_k and so on.

    seed: the engine's. num_outputs: of the answer's tokens, how many stand in front of it.
    """
    params = [sequence.params for sequence in drawing]
    columns = zip(*((p.temperature, p.top_p, p.min_p) for p in params), strict=True)
    floats = torch.tensor(tuple(columns), dtype=torch.float32, device=logits.device)
    temperature, top_p, min_p = floats  # rows of it: a kernel reads each as lying side by side
    top_k = torch.tensor([p.top_k for p in params], device=logits.device)
    keys = [_key(seed, sequence) for sequence in drawing]
    uniforms = [uniform(key, position) for key, position in zip(keys, num_outputs, strict=True)]
    uniforms_of = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    chosen = logits if len(rows) == logits.shape[0] else logits[rows]
    tokens: list[int] = ops.draw(chosen, temperature, top_k, top_p, min_p, uniforms_of).tolist()
    return tokens


def _key(engine_seed: int, sequence: Sequence) -> str:
    """A request's own seed, or one for each request that came without."""
    seed = sequence.params.seed
    return f"seed {seed}" if seed is not None else f"engine {engine_seed} request {sequence.number}"


def uniform(key: str, position: int) -> float:
    """A number in [0, 1), the same for the same key and position: a hash, so that no generator has to be kept."""
    digest = blake2b(f"{key}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
