"""A model's reasoning as the engine follows it: its markers as tokens and texts, and grammars that begin with it.

Where one token ends the reasoning, and one begins it, the engine leaves it free, and a grammar is about what follows.
Other markers can end within a token that goes on, so there the grammar describes the reasoning too.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from octavo.runtime.messages import Constraint, Marker, Reasoning
from octavo.server.message.lark_rules import Rules, quoted
from octavo.server.message.parse import Formats
from octavo.server.message.patterns import literal
from octavo.server.message.scan import MARKS
from octavo.text.tokenizer import Tokenizer

ANSWER = "answer"  # the name of the grammar of what follows the reasoning
_MARK = re.compile(f"([{MARKS}])")


def reasoning_of(
    formats: Formats, tokenizer: Tokenizer, *, is_open: bool, budget: int | None, last_words: str
) -> Reasoning | None:
    """The reasoning of an answer; None where the model has none, or where its messages' grammar is enough.

    last_words: what is said in front of the end where the budget is spent.
    """
    if formats.has_channels:
        return None if not budget else _of_channels(formats, tokenizer, budget, last_words)
    form = formats.reasoning
    if form is None:
        return None
    end = _marker(form.end, formats, tokenizer)
    begin = () if is_open else _marker(form.begin, formats, tokenizer)
    closing = () if budget is None else _tokens(last_words.removesuffix(_shown(form.end, formats)), end, tokenizer)
    return Reasoning(end, is_open, begin, budget, closing, in_grammar=not (_is_token(end) and _is_token(begin or end)))


def _of_channels(formats: Formats, tokenizer: Tokenizer, budget: int, last_words: str) -> Reasoning:
    form = formats.tools
    assert form is not None
    begin = _marker(f"{form.key_begin}analysis{form.name_to_arguments}", formats, tokenizer)
    end = _marker(form.section_end, formats, tokenizer)
    return Reasoning(end, False, begin, budget, _tokens(last_words, end, tokenizer), in_grammar=True)


def _shown(text: str, formats: Formats) -> str:
    return "".join(formats.shown.get(character, character) for character in text)


def _marker(text: str, formats: Formats, tokenizer: Tokenizer) -> Marker:
    """A marker, with the formats' marks in it, in pieces."""
    whole = tokenizer.token_id(_shown(text, formats))
    if whole is not None:
        return (whole,)
    ids = {mark: token_id for token_id, mark in formats.marks.items()}
    return tuple(ids.get(piece, piece) for piece in _MARK.split(text) if piece)


def _is_token(marker: Marker) -> bool:
    return len(marker) == 1 and isinstance(marker[0], int)


def _tokens(last_words: str, end: Marker, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The last words and the end, as the model would write them."""
    closing: list[int] = []
    text = last_words
    for piece in end:
        text += piece if isinstance(piece, str) else ""
        if isinstance(piece, int):
            closing += tokenizer.encode(text, add_special_tokens=False) if text else []
            closing.append(piece)
            text = ""
    return (*closing, *(tokenizer.encode(text, add_special_tokens=False) if text else ()))


def with_reasoning(constraint: Constraint) -> Constraint:
    """A constraint whose grammar begins with the reasoning, where the engine can't leave it out."""
    reasoning = constraint.reasoning
    if reasoning is None or not reasoning.in_grammar or constraint.triggers is not None:
        return constraint
    rules = Rules()
    thoughts = f"{_ended(reasoning.end, rules)} {rules.space}"
    if not reasoning.is_open:
        begin = " ".join(f"<[{piece}]>" if isinstance(piece, int) else quoted(piece) for piece in reasoning.begin)
        thoughts = f"({rules.space} {begin} {thoughts})?"
    first, *others = msgspec.json.decode(constraint.grammar)["grammars"]
    lines = [f"start: {thoughts} @{ANSWER}", *rules.lines]
    grammars: list[dict[str, Any]] = [{"lark_grammar": "\n".join(lines)}, {**first, "name": ANSWER}, *others]
    text = msgspec.json.encode({"grammars": grammars}).decode()
    return msgspec.structs.replace(constraint, grammar=text)


def _ended(end: Marker, rules: Rules) -> str:
    """Any text up to the end marker."""
    first, *others = end
    if isinstance(first, int):
        said = [rules("/(?s:.*)/", terminal=True), f"<[{first}]>"]
    else:
        said = [rules(f"/(?s:.*){literal(first)}/", terminal=bool(others), lazy=not others)]
    said += [f"<[{piece}]>" if isinstance(piece, int) else quoted(piece) for piece in others]
    return " ".join(said)
