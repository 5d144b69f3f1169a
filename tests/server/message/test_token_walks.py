"""Whatever tool_choice and the tools say, and however the model writes its calls: random answers under the masks of a
real tokenizer are read back as calls that the request asked for, with nothing left over, however they are cut.

The models' markers are tokens, as they are in released models; with markers that are text the tests are slow ones.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import lark
import pytest
from call_walks import CALL_SCHEMAS
from templates import FIXTURES, inference, prompt_of
from token_walks import Answer, TokenWalker

from octavo.server.dialects.chat_request import ChatCompletionRequest
from octavo.server.dialects.custom_input import InputText
from octavo.server.message.layout import layout_of
from octavo.server.message.parts import calls_of, text_of

pytestmark = pytest.mark.long

TOOLS = [
    {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}
    for name, schema in CALL_SCHEMAS.items()
]
STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
WORDS = 'start: word (" " word)*\nword: "a".."c" | "\\"x\\"" | "\\n"\n'
PATTERN = r"[a-c\"]{2,4}\n[0-9]+"


def custom(syntax: str, definition: str) -> dict[str, Any]:
    format_ = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    return {"type": "custom", "custom": {"name": "write", "format": format_}}


def named(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


NO_CALL: dict[str, Any] = {"type": "object", "properties": {"said": {"enum": [1, 2]}}, "required": ["said"]}
CONTENT = {"json_schema": {"name": "x", "schema": {**NO_CALL, "additionalProperties": False}}, "type": "json_schema"}
REQUESTS: dict[str, dict[str, Any]] = {
    "required": {"tool_choice": "required"},
    "named": {"tool_choice": named("get")[0]},
    "one": {"tool_choice": "required", "parallel_tool_calls": False},
    "strict": {"tools": STRICT},
    "auto": {"parallel_tool_calls": False},
    "allowed": {
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": named("get", "none")},
        }
    },
    "lark": {"tools": [*TOOLS, custom("lark", WORDS)], "tool_choice": {"type": "custom", "custom": {"name": "write"}}},
    "regex": {"tools": [custom("regex", PATTERN)], "tool_choice": "required"},
    "content": {"response_format": CONTENT},
}
NAMES = {"named": {"get"}, "allowed": {"get", "none"}, "lark": {"write"}, "regex": {"write"}}
ONE = {"named", "one", "auto", "lark"}


@cache
def one_of_each_format() -> list[str]:
    """One template for each way to call and think."""
    names = sorted(path.stem for path in (FIXTURES / "templates").glob("*.jinja"))
    found = {(inference(name).tools, inference(name).reasoning): name for name in names if inference(name).tools}
    return sorted(found.values())


@cache
def walker(name: str, *, has_tokens: bool) -> TokenWalker:
    return TokenWalker(inference(name), has_tokens=has_tokens)


def beginning(name: str) -> str:
    """What wakes the grammar of an answer that may call."""
    form = inference(name).tools
    assert form is not None
    layout = layout_of(form, "exact")
    if layout.openers and form.kind != "channel" and not form.content_name:
        return layout.openers[0]
    return '{"name": "get"' if layout.bare else ""


def check(request: str, body: ChatCompletionRequest, answer: Answer, *, says_more: bool) -> None:
    """What every answer must be. says_more: its messages may also say something beside the calls."""
    said = [(part.kind, part.text) for part in answer.whole]
    assert said == [(part.kind, part.text) for part in answer.by_character], answer.text
    assert answer.num_malformed == 0, answer.text
    calls = calls_of(answer.whole)
    assert all(call.is_complete for call in calls), answer.text
    assert {call.name for call in calls} <= NAMES.get(request, set(CALL_SCHEMAS)), answer.text
    assert len(calls) <= 1 or request not in ONE, answer.text
    for call in calls:
        if call.name == "write":
            text = InputText().take(call.arguments)
            assert list(json.loads(call.arguments).items()) == [("input", text)]
            if request == "lark":
                lark.Lark(WORDS, parser="earley", lexer="dynamic_complete").parse(text)
            else:
                assert re.fullmatch(PATTERN, text), text
        else:
            jsonschema.validate(json.loads(call.arguments), CALL_SCHEMAS[call.name])
    content = text_of(answer.whole).strip()
    if request == "content" and not calls:
        assert content[:1] == "{", answer.text
        jsonschema.validate(json.loads(content), NO_CALL)
    elif not says_more:
        assert content == "", answer.text
    assert calls or not body.must_call, answer.text


@pytest.mark.parametrize("has_tokens", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_answers_are_what_the_request_asked_for(request_name: str, has_tokens: bool) -> None:
    for name in one_of_each_format():
        form = inference(name).tools
        assert form is not None
        if has_tokens or request_name != "content" or form.kind != "channel":  # whose messages end by tokens
            num_ended = walk(name, request_name, has_tokens=has_tokens)
            assert num_ended or request_name == "strict", name


def walk(name: str, request_name: str, *, has_tokens: bool) -> int:
    """Check some answers of one model; returns how many there were that ended."""
    form = inference(name).tools
    reasoning = inference(name).reasoning
    assert form is not None
    fields = {"tools": TOOLS, **REQUESTS[request_name]}
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], **fields})
    here = walker(name, has_tokens=has_tokens)
    constraint, reading = here.asked(body, prompt_of(name))
    num_ended = 0
    for seed in range(2):
        begun = beginning(name) if constraint.triggers is not None else ""
        if reasoning is not None and reading.reasoning_is_open:
            begun = f"hm{reasoning.end}{begun}"
        elif reasoning is not None and constraint.reasoning is not None and seed:
            begun = f"{reasoning.begin}hm{reasoning.end}{begun}"
        answer = here.answer(constraint, reading, seed, begun)
        if answer is not None:
            num_ended += 1
            says_more = form.kind == "channel" or (bool(form.content_name) and not body.must_call)
            check(request_name, body, answer, says_more=says_more)
    return num_ended
