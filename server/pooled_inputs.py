"""From texts to what pooled requests compute: token ids with special tokens around them, cut to size where asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from octavo.server.dialects.fields import MAX_TOKENS_SENT
from octavo.server.errors import bad_request, too_long
from octavo.server.pooled_text import PooledText
from octavo.server.prompts import encode, in_vocabulary
from octavo.server.served_model import ServedModel

Side = Literal["left", "right"]
MOST_REPEATED = 1 << 24  # characters of a prompt or query, counted for each text that they stand in front of


@dataclass(frozen=True, slots=True)
class Cut:
    """What becomes of texts that are too long. most: tokens that are kept; None: they are refused; -1: what the model
    takes. side: the one that is cut off. limit: tokens that a text may have which is refused beyond; None: the model's.
    """

    most: int | None = None
    side: Side = "right"
    limit: int | None = None

    def within(self, most: int) -> Cut:
        """The same with no text longer than so many tokens, and than the model takes."""
        own = self.most
        return Cut(most if own is None or own == -1 else min(most, own), self.side)


@dataclass(frozen=True, slots=True)
class PooledPrompt:
    """What one result is computed of. second: where the second of two texts begins, whose tokens have another type."""

    token_ids: list[int]
    second: int | None = None


def pooled_facts(model: ServedModel) -> PooledText:
    """Of a model that is known to be pooled."""
    assert model.pooled is not None
    return model.pooled


def text_prompt(
    text: str, name: str, model: ServedModel, cut: Cut, *, before: str = "", add_special_tokens: bool = True
) -> PooledPrompt:
    """One text behind `before`, one of the model's prompts. Raises ApiError, which names the field `name`."""
    whole = _lowered(before + text, model)
    most = limit_of(cut, model)
    must_fit = cut.most is None
    ids = encode(whole, name, model, add_special_tokens=add_special_tokens, must_fit=must_fit)
    if cut.most is not None and len(ids) > most:
        frame = model.tokenizer.frame if add_special_tokens else ([], [])
        plain = encode(whole, name, model, add_special_tokens=False, must_fit=False)
        ids = [*frame[0], *_cut(plain, most - len(frame[0]) - len(frame[1]), cut.side), *frame[1]]
    if cut.limit is not None and len(ids) > cut.limit:
        raise bad_request(f"{name}: a text has {len(ids)} tokens, and max_tokens {cut.limit} with truncate NONE", name)
    return PooledPrompt(checked(ids, name, model))


def pair_prompt(
    first: str,
    second: str,
    name: str,
    model: ServedModel,
    cut: Cut,
    *,
    most_of_second: int | None = None,
    known: dict[str, list[int]] | None = None,
) -> PooledPrompt:
    """Two texts as a cross-encoder reads them. Where they are cut, it is as tokenizers' longest_first does it: the
    shorter one keeps half of the room at most, and the longer one the rest.

    most_of_second: tokens of the second one that are kept whatever `cut` says. known: tokens of first texts, which
    this one is added to: a query is tokenized once for all of its documents.
    """
    before, between, after = model.tokenizer.pair_frame
    must_fit = cut.most is None and most_of_second is None
    known = {} if known is None else known
    if first not in known:
        known[first] = encode(_lowered(first, model), name, model, add_special_tokens=False, must_fit=must_fit)
    one = known[first]
    other = encode(_lowered(second, model), name, model, add_special_tokens=False, must_fit=must_fit)
    other = other if most_of_second is None else other[:most_of_second]
    if cut.most is not None:
        room = limit_of(cut, model) - len(before) - len(between) - len(after)
        if len(one) + len(other) > room:
            shorter = min(len(one), len(other), room // 2)
            of_one, of_other = (room - shorter, shorter) if len(one) > len(other) else (shorter, room - shorter)
            one, other = _cut(one, of_one, cut.side), _cut(other, of_other, cut.side)
    begin = len(before) + len(one) + len(between)
    has_types = pooled_facts(model).facts.num_token_types > 1 and model.tokenizer.pairs_have_types
    ids = [*before, *one, *between, *other, *after]
    return PooledPrompt(checked(ids, name, model), begin if has_types else None)


def ids_prompt(ids: list[int], name: str, model: ServedModel, cut: Cut) -> PooledPrompt:
    """Token ids as a client has them, which are cut as they are."""
    in_vocabulary(ids, name, model)
    if cut.most is not None:
        ids = _cut(ids, limit_of(cut, model), cut.side)
    return PooledPrompt(checked(ids, name, model))


def limit_of(cut: Cut, model: ServedModel) -> int:
    """How many tokens a text may have. Raises ApiError for more than the model takes."""
    if cut.most is None or cut.most == -1:
        return model.max_model_len
    if cut.most > model.max_model_len:
        raise bad_request(
            f"truncate_prompt_tokens {cut.most} is more than this model takes, {model.max_model_len} tokens; "
            "-1 keeps what it takes",
            "truncate_prompt_tokens",
        )
    return cut.most


def checked(ids: list[int], name: str, model: ServedModel) -> list[int]:
    """The same ids, of which there is one at least, and as many as the model takes at most."""
    if not ids:
        raise bad_request(f"{name}: the text is empty, and this tokenizer adds no tokens to it", name)
    if len(ids) > model.max_model_len:
        raise too_long(
            model.max_model_len,
            f"However, {name} has {len(ids)} tokens. Shorten it, or truncate_prompt_tokens -1 cuts it",
            name,
        )
    return ids


def within_total(prompts: Iterable[PooledPrompt], name: str) -> list[PooledPrompt]:
    """Prompts that are made one by one, while they aren't too many: megabytes must not become gigabytes."""
    found: list[PooledPrompt] = []
    total = 0
    for prompt in prompts:
        total += len(prompt.token_ids)
        if total > MAX_TOKENS_SENT:
            raise bad_request(
                f"{name}: {total} tokens in the first {len(found) + 1} texts; a request may send {MAX_TOKENS_SENT}. "
                "Make several of it",
                name,
            )
        found.append(prompt)
    return found


def repeated(text: str, count: int, name: str) -> int:
    """Characters that are tokenized beside the body's own, as each of count texts has `text` in front of it.

    Raises ApiError for very many, which also a request whose texts are cut would be tokenized for.
    """
    size = len(text) * count
    if size > MOST_REPEATED:
        raise bad_request(
            f"{name}: {len(text)} characters in front of each of {count} texts; a request may have {MOST_REPEATED} "
            "in all. Make several of it",
            name,
        )
    return size


def _lowered(text: str, model: ServedModel) -> str:
    return text.lower() if pooled_facts(model).lowers else text


def _cut(ids: list[int], count: int, side: Side) -> list[int]:
    count = max(0, count)
    if side == "right":
        return ids[:count]
    return ids[len(ids) - count :] if count < len(ids) else ids
