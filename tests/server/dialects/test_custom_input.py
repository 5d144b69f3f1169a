"""The text of a custom tool's call, out of arguments that come in any pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server.dialects.custom_input import InputText, input_schema, wrapped


@given(st.text(), st.booleans(), st.integers(1, 7))
def test_any_text_in_any_pieces(text: str, is_ascii: bool, size: int) -> None:
    assert json.loads(wrapped(text)) == {"input": text}
    arguments = json.dumps({"input": text}, ensure_ascii=is_ascii)
    taker = InputText()
    pieces = [taker.take(arguments[start : start + size]) for start in range(0, len(arguments), size)]
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (' { "input" :  "a\\/b\\u00fc"}', "a/bü"),
        ('{"input": "\\ud83d\\ude42"} ', "🙂"),
        ('{"input": "\\ud83dx\\ud83d\\n"}', "\ufffdx\ufffd\n"),
        ('{"input": "\\ud83d\\u0041"}', "\ufffdA"),
        ('{"input": "\\udc00."}', "\ufffd."),
        ('{"input": "line\nline"}', "line\nline"),
        ('{"input": "cut \\u00', "cut "),
        ('{"inp', ""),
        ("{}", ""),
    ],
)
def test_what_models_write(arguments: str, text: str) -> None:
    taker = InputText()
    assert "".join(map(taker.take, arguments)) == text
    assert InputText().take(arguments) == text


def test_a_pattern_holds_for_the_whole_text() -> None:
    assert input_schema("a|b")["properties"]["input"]["pattern"] == "^(?:a|b)$"
