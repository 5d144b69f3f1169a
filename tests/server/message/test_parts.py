"""Parts are the same however the steps have cut the text, and stop strings end them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server.message.parse import Parser
from octavo.server.message.parts import Part, append_parts, text_of
from octavo.text.detokenizer import Detokenizer, IncrementalDecoder
from octavo.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.open(Path(__file__).parents[2] / "fixtures" / "tiny")


def parser(stops: tuple[str, ...] = ()) -> Parser:
    return Parser(Detokenizer(IncrementalDecoder(TOKENIZER), stops))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.lists(st.integers(1, 5), max_size=40))
def test_steps_of_any_size_say_the_same(text: str, sizes: list[int]) -> None:
    ids = TOKENIZER.encode(text)
    it = parser()
    parts: list[Part] = []
    while ids:
        size = sizes.pop() if sizes else len(ids)
        for token_id in ids[:size]:
            it.push(token_id, silent=False)
        ids = ids[size:]
        append_parts(parts, it.take())
    it.finish()
    append_parts(parts, it.take())
    assert parts == ([Part("text", text)] if text else [])


@pytest.mark.parametrize(("stops", "said", "stop"), [((), "one two three", None), (("two",), "one ", "two")])
def test_stop_strings_end_what_is_said(stops: tuple[str, ...], said: str, stop: str | None) -> None:
    it = parser(stops)
    parts: list[Part] = []
    for token_id in TOKENIZER.encode("one two three"):
        it.push(token_id, silent=False)
        append_parts(parts, it.take())
        if it.stopped_by is not None:
            break
    it.finish()
    append_parts(parts, it.take())
    assert (text_of(parts), it.stopped_by) == (said, stop)
    assert it.length == len(said)


def test_what_is_silent_says_nothing() -> None:
    it = parser()
    for token_id in TOKENIZER.encode("one"):
        it.push(token_id, silent=True)
    assert it.take() == []


def test_joining_does_not_change_what_is_joined() -> None:
    first = Part("text", "a")
    later = Part("text", "b")
    parts: list[Part] = []
    append_parts(parts, [first])
    append_parts(parts, [later])
    assert (parts, first.text, later.text) == ([Part("text", "ab")], "a", "b")
