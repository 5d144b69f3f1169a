"""Log-probabilities in the shapes of three APIs: completions, chat completions, and vLLM's prompt_logprobs.

Arrays are generators, since an answer may have millions of entries; see server/encoding.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from octavo.runtime.messages import Logprobs
from octavo.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf; vLLM writes this


def completion_logprobs(
    entries: Sequence[Logprobs | None], token_ids: Sequence[int], offsets: Sequence[int], tokenizer: Tokenizer
) -> dict[str, Any]:
    """OpenAI's legacy shape: parallel lists. An entry is None where nothing predicts the token: a prompt's first."""
    name = tokenizer.token_text
    return {
        "tokens": (name(token_id) for token_id in token_ids),
        "token_logprobs": (None if entry is None else finite(entry.logprob) for entry in entries),
        "top_logprobs": (None if entry is None else _by_name(entry, tokenizer) for entry in entries),
        "text_offset": list(offsets),
    }


def _by_name(entry: Logprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """The most likely tokens and the token itself; of two tokens of the same text the likelier one counts."""
    named = {tokenizer.token_text(token_id): finite(logprob) for token_id, logprob in reversed(_top(entry))}
    named.setdefault(tokenizer.token_text(entry.token_id), finite(entry.logprob))
    return dict(reversed(named.items()))


def chat_logprobs(entries: Iterable[Logprobs], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """OpenAI's shape for chat: one object a token, with its bytes."""
    for entry in entries:
        tops = [_token(token_id, logprob, tokenizer) for token_id, logprob in _top(entry)]
        yield _token(entry.token_id, entry.logprob, tokenizer) | {"top_logprobs": tops}


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def prompt_logprobs(entries: Sequence[Logprobs | None], tokenizer: Tokenizer) -> Iterator[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token, token id -> log-probability, rank and text."""
    for entry in entries:
        yield None if entry is None else _ranked(entry, tokenizer)


def _ranked(entry: Logprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(_top(entry), start=1)]
    return {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}
        for token_id, logprob, rank in ranked
    }


def _top(entry: Logprobs) -> list[tuple[int, float]]:
    return list(zip(entry.top_ids, entry.top_logprobs, strict=True))


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return max(logprob, LOWEST)
