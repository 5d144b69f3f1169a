"""What quantization cost, measured: the same text through the original and the quantized model.

Knows two functions from token ids to logits, not how they are computed: the caller passes the serving path itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # token ids [T] int64 -> [T, vocab] float32
ROWS = 64  # rows of logits compared at a time: a vocabulary of 262,144 in float64 is 134 MB then


@dataclass(frozen=True)
class Quality:
    """Over num_tokens predictions of the next token.

    perplexity_*     exp of the mean negative log-likelihood of the text
    mean_kl, p99_kl  KL(original || quantized) of the next token's distribution, in nats: mean and 99th percentile
    top1_agreement   share of positions where both find the same token most likely
    """

    num_tokens: int
    perplexity_before: float
    perplexity_after: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float


def held_out_text() -> str:
    """English prose, a little code and lists: written for this project, so no model was trained on it."""
    return Path(__file__).with_name("held_out.txt").read_text("utf-8")


def windows(token_ids: list[int], length: int, prefix: list[int] | None = None) -> list[Tensor]:
    """Consecutive windows of at most `length` tokens, each behind `prefix` (a model's BOS); the last may be shorter."""
    prefix = prefix or []
    step = length - len(prefix)
    cuts = [token_ids[i : i + step] for i in range(0, len(token_ids), step)]
    return [torch.tensor(prefix + cut) for cut in cuts if len(prefix) + len(cut) >= 2]


def measure(original: Logits, quantized: Logits, token_windows: Iterable[Tensor]) -> Quality:
    """Compare two models over windows [T] of token ids. Raises ValueError when a model gives NaN."""
    nll_before = nll_after = 0.0
    agree = 0
    divergences: list[Tensor] = []
    for token_ids in token_windows:
        before, after = original(token_ids), quantized(token_ids)
        for begin in range(0, len(token_ids) - 1, ROWS):
            stop = min(begin + ROWS, len(token_ids) - 1)
            p = before[begin:stop].double().log_softmax(-1)
            q = after[begin:stop].double().log_softmax(-1)
            targets = token_ids[begin + 1 : stop + 1].unsqueeze(1)
            nll_before -= float(p.gather(1, targets).sum())
            nll_after -= float(q.gather(1, targets).sum())
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            # Where p is 0 its term is 0, whatever q is: -inf - -inf would make it NaN.
            divergences.append(torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1))
    if not divergences:
        raise ValueError("no window of two tokens or more to measure on")
    kl = torch.cat(divergences)
    if not math.isfinite(nll_before + nll_after) or bool(kl.isnan().any()):
        raise ValueError("a model gave NaN or infinite logits")
    count = kl.numel()
    return Quality(
        num_tokens=count,
        perplexity_before=math.exp(nll_before / count),
        perplexity_after=math.exp(nll_after / count),
        mean_kl=float(kl.mean()),
        p99_kl=float(kl.quantile(0.99)),
        top1_agreement=agree / count,
    )
