"""Answers encoded piece by piece are, to the byte, what msgspec makes of them at once; others have their turns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server import encoding
from octavo.server.encoding import encode_in_turns, encode_json, json_pieces

LEAVES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)  # a tuple here becomes a generator
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


def with_generators(value: Any) -> Any:
    """The value with its tuples as generators."""
    if isinstance(value, tuple):
        return (with_generators(item) for item in value)
    if isinstance(value, list):
        return [with_generators(item) for item in value]
    if isinstance(value, dict):
        return {key: with_generators(member) for key, member in value.items()}
    return value


@given(VALUES)
def test_pieces_are_what_is_encoded_at_once(value: Any) -> None:
    whole = msgspec.json.encode(value)
    assert b"".join(json_pieces(with_generators(value))) == whole
    assert encode_json(with_generators(value)) == whole
    assert b"".join(asyncio.run(encode_in_turns(with_generators(value)))) == whole


def test_others_have_their_turns_between_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "TURN_SECONDS", -1.0)  # each piece takes longer than that
    seen: list[int] = []
    made = 0

    def entries() -> Iterator[int]:
        nonlocal made
        for number in range(100):
            made = number
            yield number

    async def other() -> None:
        while made < 99:
            seen.append(made)
            await asyncio.sleep(0)

    async def both() -> list[bytes]:
        answer, _ = await asyncio.gather(encode_in_turns({"entries": entries()}), other())
        return answer

    assert b"".join(asyncio.run(both())) == msgspec.json.encode({"entries": list(range(100))})
    assert len(set(seen)) > 50


def test_what_is_no_part_of_an_answer_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="object is no part of an answer"):
        encode_json({"a": object()})
