"""What a model's answers are worth beside the first one's: perplexity, KL divergence, the same most likely token.

Checkpoints are compared by `octavo eval`, in a process of its own, over whole distributions. A server of somebody's is
asked for `prompt_logprobs` of the same tokens: it gives the probability of each token of the text and the most likely
one, from which perplexity and agreement follow, while the KL divergence does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from octavo.bench.http import Client, HttpError, within
from octavo.jobs.cost.statistics import Interval, mean_interval

WINDOW = 256  # tokens, as in `octavo eval`
WINDOW_SECONDS = 600.0  # in which a server that doesn't hang reads one


class CostQuality(msgspec.Struct, frozen=True, omit_defaults=True):
    """None: not measured, and `missing` says why. kl: nats per token; top1: share of the same most likely tokens."""

    how: str = ""
    num_tokens: int = 0
    perplexity: Interval | None = None
    kl: Interval | None = None
    top1: Interval | None = None
    missing: str = ""


class Answered(msgspec.Struct, frozen=True):
    """What a server says of a text, window by window: log-probabilities of its tokens, and the likeliest tokens."""

    log_probs: list[list[float]]
    likeliest: list[list[int]]


def of_comparison(report: dict[str, Any]) -> CostQuality:
    """From the JSON of `octavo eval MODEL --against ORIGINAL`."""
    quality = report.get("quality")
    if quality is None:
        return CostQuality(missing="; ".join(report.get("warnings", ())) or "octavo eval gave no figures")
    windows = quality["by_window"]
    counts = [window["num_tokens"] for window in windows]
    return CostQuality(
        how=f"octavo eval over {quality['text']}",
        num_tokens=quality["num_tokens"],
        perplexity=_perplexity([window["nll_after"] for window in windows], counts),
        kl=_per_token([window["kl"] for window in windows], counts),
        top1=_share(_per_token([window["agreeing"] for window in windows], counts)),
    )


def of_reference(report: dict[str, Any]) -> CostQuality:
    """Of the first model, out of a comparison with another: it is what the others are measured against."""
    windows = report["quality"]["by_window"]
    counts = [window["num_tokens"] for window in windows]
    return CostQuality(
        how=f"octavo eval over {report['quality']['text']}",
        num_tokens=report["quality"]["num_tokens"],
        perplexity=_perplexity([window["nll_before"] for window in windows], counts),
        kl=Interval(0.0, 0.0, 0.0),
        top1=Interval(1.0, 1.0, 1.0),
    )


def of_answers(answered: Answered, first: Answered | None) -> CostQuality:
    """Of a server that was asked; `first` is what the first model's server says of the same windows."""
    counts = [len(window) for window in answered.log_probs]
    agreement = None
    if first is not None:
        pairs = zip(first.likeliest, answered.likeliest, strict=True)
        same = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairs]
        agreement = _share(_per_token([float(count) for count in same], counts))
    return CostQuality(
        how="the server's prompt_logprobs of octavo's held-out text",
        num_tokens=sum(counts),
        perplexity=_perplexity([-sum(window) for window in answered.log_probs], counts),
        top1=agreement,
        missing="KL: a server gives the probabilities of a few tokens only",
    )


async def ask_server(client: Client, model: str, windows: Sequence[Sequence[int]]) -> Answered:
    """Ask for prompt_logprobs of windows of token ids. Raises HttpError where a server has none."""
    log_probs: list[list[float]] = []
    likeliest: list[list[int]] = []
    for window in windows:
        body = {"model": model, "prompt": list(window), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        asked = client.json("POST", "/v1/completions", body)
        answer = await within(WINDOW_SECONDS, "POST /v1/completions", asked)
        found = answer["choices"][0].get("prompt_logprobs") if answer.get("choices") else None
        if not found or len(found) != len(window):
            raise HttpError("the server gives no prompt_logprobs")
        entries = [_entry(row, token) for row, token in zip(found[1:], window[1:], strict=True)]
        log_probs.append([entry[0] for entry in entries])
        likeliest.append([entry[1] for entry in entries])
    return Answered(log_probs, likeliest)


async def windows_of(client: Client, model: str, text: str, max_tokens: int) -> list[list[int]]:
    """Windows of a text in the tokens of a server, by its /tokenize. Raises HttpError."""
    answer = await client.json("POST", "/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not tokens:
        raise HttpError("the server has no /tokenize that gives tokens")
    cut = tokens[:max_tokens]
    return [window for i in range(0, len(cut), WINDOW) if len(window := cut[i : i + WINDOW]) >= 2]


def _entry(row: dict[str, Any], token: int) -> tuple[float, int]:
    """The log-probability of a token of the text, and the most likely token in its place."""
    try:
        best = min(row, key=lambda name: row[name]["rank"])
        return max(float(row[str(token)]["logprob"]), -1e4), int(best)
    except (KeyError, TypeError, ValueError) as e:
        raise HttpError(f"prompt_logprobs are not as vLLM's: {json.dumps(row)[:100]}") from e


def _per_token(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    return mean_interval([total / count for total, count in zip(sums, counts, strict=True)], counts)


def _perplexity(nll: Sequence[float], counts: Sequence[int]) -> Interval:
    """exp of the mean negative log-likelihood."""
    mean = _per_token(nll, counts)
    return Interval(math.exp(mean.value), math.exp(mean.low), math.exp(min(mean.high, 700.0)))


def _share(interval: Interval) -> Interval:
    return Interval(interval.value, interval.low, min(interval.high, 1.0))
