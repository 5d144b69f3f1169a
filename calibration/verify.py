"""Measures the cost of quantization: compares the original's and the quantized model's logits for the same text.

Knows logits and hidden states, not where they come from: the caller runs the serving path itself, one model after the
other if it likes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ROWS = 64  # rows of logits compared at a time: a vocabulary of 262,144 in float64 is 134 MB then
KL_EDGES = tuple(10 ** (e / 4) for e in range(-24, 5))  # of the histogram, in nats: four bins a decade, 1e-6 to 10
HELD_OUT = "octavo's held-out text"

Side = Literal["original", "quantized"]


class NotFiniteError(ValueError):
    """A model that gave NaN or an infinite number. side tells which; a quantized one is not to be used."""

    def __init__(self, side: Side, what: str) -> None:
        super().__init__(f"the {side} model {what}")
        self.side = side


@dataclass(frozen=True)
class BlockSnr:
    """Signal-to-noise ratio of the hidden state behind a decoder block, in dB; None: not a bit differs.

    Of a token it is |h|^2 / |h' - h|^2, of the text one over the mean of the tokens' inverses. (A ratio of sums would
    show the first token alone, whose hidden state is a thousand times as large as the others' in many models.)
    """

    block: int
    snr_db: float | None

    @property
    def noise(self) -> float:
        """The mean of |h' - h|^2 / |h|^2."""
        return 0.0 if self.snr_db is None else float(10 ** (-self.snr_db / 10))


@dataclass(frozen=True)
class WindowQuality:
    """What one window adds to a Quality: sums over its num_tokens predictions."""

    num_tokens: int
    nll_before: float
    nll_after: float
    kl: float
    agreeing: int


@dataclass(frozen=True)
class Quality:
    """Over num_tokens predictions of the next token, in windows of at most `window` tokens of the text.

    text             where the text is from: HELD_OUT, or a file's name
    perplexity_*     exp of the mean negative log-likelihood of the text
    mean_kl, p99_kl  KL(original || quantized) of the next token's distribution, in nats: mean and 99th percentile
    top1_agreement   share of positions where both find the same token most likely
    kl_histogram     how many positions have a KL below KL_EDGES[0], between each two edges, and from the last up
    blocks           of each decoder block; empty where a model doesn't show its hidden states (--model-impl hf), or has
                     rotated ones
    by_window        of each window: how far the figures differ from text to text
    """

    text: str
    window: int
    num_tokens: int
    perplexity_before: float
    perplexity_after: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    kl_histogram: tuple[int, ...]
    blocks: tuple[BlockSnr, ...] = ()
    by_window: tuple[WindowQuality, ...] = ()

    @property
    def perplexity_change(self) -> float:
        """As a share of the original's: 0.01 is one percent more."""
        return self.perplexity_after / self.perplexity_before - 1


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model: exp of the mean negative log-likelihood of num_tokens tokens."""

    text: str
    window: int
    num_tokens: int
    perplexity: float


def held_out_text() -> str:
    """English prose, a little code and lists: written for this project, so no model was trained on it."""
    return Path(__file__).with_name("held_out.txt").read_text("utf-8")


def windows(token_ids: list[int], length: int, prefix: list[int] | None = None) -> list[Tensor]:
    """Consecutive windows of at most `length` tokens, each behind `prefix` (a model's BOS); the last may be shorter."""
    prefix = prefix or []
    step = length - len(prefix)
    cuts = [token_ids[i : i + step] for i in range(0, len(token_ids), step)]
    return [torch.tensor(prefix + cut) for cut in cuts if len(prefix) + len(cut) >= 2]


class Likelihood:
    """Adds up how likely a model finds a text, window by window."""

    def __init__(self, side: Side = "original") -> None:
        self._side: Side = side
        self.nll = 0.0
        self.num_tokens = 0

    def add(self, token_ids: Tensor, logits: Tensor) -> None:
        """token_ids [T] and the logits [T, vocab] behind each. Raises NotFiniteError."""
        for rows in _chunks(len(token_ids) - 1):
            self.add_rows(token_ids[rows.start + 1 : rows.stop + 1], _log_probs(logits[rows], self._side))

    def add_rows(self, targets: Tensor, log_probs: Tensor) -> None:
        """The tokens [R] that follow, and log-probabilities [R, vocab] float64 of what could."""
        nll = -float(log_probs.gather(1, targets.unsqueeze(1)).sum())
        if not math.isfinite(nll):
            raise NotFiniteError(self._side, "gives a token of the text the probability 0")
        self.nll += nll
        self.num_tokens += len(targets)

    @property
    def perplexity(self) -> float:
        """Raises ValueError when there was nothing to predict."""
        if self.num_tokens == 0:
            raise ValueError("no window of two tokens or more to measure on")
        return math.exp(self.nll / self.num_tokens)


class Comparison:
    """Adds up what two models say of the same text, window by window, in float64."""

    def __init__(self) -> None:
        self._before = Likelihood("original")
        self._after = Likelihood("quantized")
        self._agree = 0
        self._kl: list[Tensor] = []
        self._windows: list[WindowQuality] = []

    def add(self, token_ids: Tensor, before: Tensor, after: Tensor) -> None:
        """token_ids [T] and both models' logits [T, vocab] behind each. Raises NotFiniteError."""
        nll = self._before.nll, self._after.nll
        agreeing = self._agree
        chunks = len(self._kl)
        for rows in _chunks(len(token_ids) - 1):
            p = _log_probs(before[rows], "original")
            q = _log_probs(after[rows], "quantized")
            targets = token_ids[rows.start + 1 : rows.stop + 1]
            self._before.add_rows(targets, p)
            self._after.add_rows(targets, q)
            self._agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            # Where p is 0 its term is 0, whatever q is: -inf - -inf would make it NaN.
            kl = torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)
            if not bool(kl.isfinite().all()):
                raise NotFiniteError("quantized", "gives the probability 0 to a token that the original may choose")
            self._kl.append(kl.clamp(min=0))  # rounding alone can make it -1e-17
        self._windows.append(
            WindowQuality(
                num_tokens=len(token_ids) - 1,
                nll_before=self._before.nll - nll[0],
                nll_after=self._after.nll - nll[1],
                kl=sum(float(kl.sum()) for kl in self._kl[chunks:]),
                agreeing=self._agree - agreeing,
            )
        )

    def result(self, text: str, window: int, blocks: tuple[BlockSnr, ...] = ()) -> Quality:
        """Raises ValueError when there was nothing to predict."""
        perplexity = self._before.perplexity
        kl = torch.cat(self._kl).numpy()
        return Quality(
            text=text,
            window=window,
            num_tokens=self._before.num_tokens,
            perplexity_before=perplexity,
            perplexity_after=self._after.perplexity,
            mean_kl=float(kl.mean()),
            p99_kl=float(np.quantile(kl, 0.99)),
            top1_agreement=self._agree / len(kl),
            kl_histogram=tuple(_histogram(kl)),
            blocks=blocks,
            by_window=tuple(self._windows),
        )


class BlockNoise:
    """Adds up how far each decoder block's hidden states are from the original's."""

    def __init__(self, num_blocks: int) -> None:
        self._noise = [0.0] * num_blocks
        self._tokens = [0] * num_blocks

    def add(self, block: int, before: Tensor, after: Tensor) -> None:
        """The hidden states [T, hidden] behind a block, of the original and of the quantized model."""
        signal = before.double().square().sum(-1)
        noise = (after.double() - before.double()).square().sum(-1)
        self._noise[block] += float(torch.where(noise == 0, 0.0, noise / signal).sum())
        self._tokens[block] += len(signal)

    def result(self) -> tuple[BlockSnr, ...]:
        """Raises NotFiniteError for hidden states that are not finite."""
        return tuple(self._snr(block) for block in range(len(self._noise)))

    def _snr(self, block: int) -> BlockSnr:
        noise = self._noise[block] / max(1, self._tokens[block])
        if not math.isfinite(noise):
            raise NotFiniteError("quantized", f"has hidden states behind block {block} that are not finite")
        return BlockSnr(block, -10 * math.log10(noise) if noise > 0 else None)


def added_noise(blocks: tuple[BlockSnr, ...]) -> list[tuple[int, float]]:
    """The noise that each block adds to its input's, the most first: (block, difference of the noise)."""
    levels = [0.0, *(block.noise for block in blocks)]
    added = [(block.block, b - a) for block, (a, b) in zip(blocks, pairwise(levels), strict=True)]
    return sorted(added, key=lambda row: -row[1])


def _chunks(count: int) -> list[slice]:
    return [slice(begin, min(begin + ROWS, count)) for begin in range(0, count, ROWS)]


def _log_probs(logits: Tensor, side: Side) -> Tensor:
    log_probs = logits.double().log_softmax(-1)
    if bool(log_probs.isnan().any()):
        raise NotFiniteError(side, "gave NaN or infinite logits")
    return log_probs


def _histogram(kl: np.ndarray) -> list[int]:
    bins = np.searchsorted(np.array(KL_EDGES), kl, side="right")
    return [int(count) for count in np.bincount(bins, minlength=len(KL_EDGES) + 1)]
