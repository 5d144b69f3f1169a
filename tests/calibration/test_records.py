"""Records of every dialect become documents; what is none says why."""

from __future__ import annotations

import pytest

from octavo.calibration.text.records import Document, RecordError, parse_record

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("record", "text", "messages"),
    [
        ("plain", "plain", ()),
        ({"text": "plain", "id": 3}, "plain", ()),
        ({"messages": [USER, ASSISTANT], "prompt": "Q", "text": "Q A"}, None, (USER, ASSISTANT)),
        ({"messages": None, "text": "plain"}, "plain", ()),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, None, (USER, ASSISTANT)),
        ({"conversations": [USER, ASSISTANT]}, None, (USER, ASSISTANT)),
        ({"prompt": "Q", "completion": "A"}, "QA", (USER, ASSISTANT)),
        ({"prompt": [USER], "completion": [ASSISTANT]}, None, (USER, ASSISTANT)),
        ({"instruction": "Q", "input": "", "output": "A"}, "Q\n\nA", (USER, ASSISTANT)),
        (
            {"instruction": "Q", "input": "context", "output": "A"},
            "Q\n\ncontext\n\nA",
            ({"role": "user", "content": "Q\n\ncontext"}, ASSISTANT),
        ),
    ],
)
def test_dialects(record: object, text: str | None, messages: tuple[dict[str, str], ...]) -> None:
    assert parse_record(record) == Document(text, messages)


def test_what_a_template_may_look_at_is_kept() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
    assert parse_record({"messages": [message]}).messages == (
        {"role": "assistant", "content": None, "tool_calls": calls},
    )
    parts = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
    assert parse_record({"messages": [parts]}).messages == (parts,)


@pytest.mark.parametrize(
    "record", [{"text": " \n"}, {"text": None}, {"messages": []}, "", {"prompt": "", "completion": ""}]
)
def test_empty_documents_are_known_as_such(record: object) -> None:
    assert parse_record(record).is_empty


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a"], "list is not an object with"),
        (None, "NoneType is not an object"),
        ({}, "the keys are none; needed is one of"),
        ({"body": "x", "title": "y"}, "the keys are 'body', 'title'; needed is one of"),
        ({str(i): 1 for i in range(11)}, "'7' and 3 more"),
        ({"text": 3}, '"text" is int, not a string'),
        ({"messages": "hello"}, '"messages" is str, not a list of messages'),
        ({"messages": [USER, {"content": "A"}]}, r'messages\[1\] is not an object with a "role"'),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'; only text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a part of type 'str'"),
        ({"conversations": [{"value": "Q"}]}, r'conversations\[0\] is not an object with "from"'),
        ({"conversations": [{"from": "alien", "value": "Q"}]}, "is from 'alien'; known are human"),
        ({"conversations": [{"from": "gpt", "value": None}]}, r'"conversations\[0\].value" is NoneType'),
        ({"prompt": "Q"}, "the keys are 'prompt'; needed"),
        ({"prompt": "Q", "completion": 1}, '"prompt" is str, not a list of messages'),
        ({"instruction": "Q", "output": ["A"]}, '"output" is list, not a string'),
    ],
)
def test_what_is_no_document_says_why(record: object, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse_record(record)
