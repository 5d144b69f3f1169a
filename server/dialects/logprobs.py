"""Log-probabilities in the shapes of three APIs: completions, chat completions, and vLLM's prompt_logprobs.

Arrays are generators, since an answer may have millions of entries; see server/encoding.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from octavo.runtime.messages import Logprobs
from octavo.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf; vLLM writes this


Names = Callable[[int], str]


def names_of(tokenizer: Tokenizer, *, as_ids: bool) -> Names:
    """What log-probabilities call a token: its text, or `token_id:` with its id, as return_tokens_as_token_ids asks."""
    return "token_id:{}".format if as_ids else tokenizer.token_text


def completion_logprobs(
    entries: Sequence[Logprobs | None], token_ids: Sequence[int], offsets: Sequence[int], name: Names
) -> dict[str, Any]:
    """OpenAI's legacy shape: parallel lists. An entry is None where nothing predicts the token: a prompt's first."""
    return {
        "tokens": (name(token_id) for token_id in token_ids),
        "token_logprobs": (None if entry is None else finite(entry.logprob) for entry in entries),
        "top_logprobs": (None if entry is None else _by_name(entry, name) for entry in entries),
        "text_offset": list(offsets),
    }


def _by_name(entry: Logprobs, name: Names) -> dict[str, float]:
    """The most likely tokens and the token itself; of two tokens of the same text the likelier one counts."""
    named = {name(token_id): finite(logprob) for token_id, logprob in reversed(_top(entry))}
    named.setdefault(name(entry.token_id), finite(entry.logprob))
    return dict(reversed(named.items()))


def chat_logprobs(
    entries: Iterable[Logprobs], tokenizer: Tokenizer, *, as_ids: bool = False
) -> Iterator[dict[str, Any]]:
    """OpenAI's shape for chat: one object a token, with its bytes."""
    name = names_of(tokenizer, as_ids=as_ids)
    for entry in entries:
        tops = [_token(token_id, logprob, tokenizer, name) for token_id, logprob in _top(entry)]
        yield _token(entry.token_id, entry.logprob, tokenizer, name) | {"top_logprobs": tops}


def _token(token_id: int, logprob: float, tokenizer: Tokenizer, name: Names) -> dict[str, Any]:
    return {
        "token": name(token_id),
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
