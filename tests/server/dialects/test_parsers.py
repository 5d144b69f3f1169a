"""/parse_function_call, /separate_reasoning and the tools of /tokenize, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from octavo_server import serving
from spoken import FIXTURES, TOKENIZER, TOOLS

from octavo.text.chat_template import ChatTemplate

QWEN = FIXTURES / "templates" / "octavo-qwen2.5-coder.jinja"
TEXT = 'So: <tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def with_tools() -> Iterator[httpx.Client]:
    """A server whose template knows tools."""
    with serving("--served-model-name", "tiny", "--chat-template", str(QWEN)) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("parser", [None, "hermes", "qwen25"])
def test_calls_in_a_text(with_tools: httpx.Client, parser: str | None) -> None:
    body = {"text": TEXT, "tools": TOOLS, "tool_call_parser": parser}
    answer = with_tools.post("/parse_function_call", json=body).json()
    assert answer == {
        "normal_text": "So:",
        "calls": [{"tool_index": 0, "name": "get_time", "parameters": '{"city": "Rome"}'}],
    }
    pythonic = {"text": '[get_time(city="Rome")]', "tools": TOOLS, "tool_call_parser": "pythonic"}
    assert with_tools.post("/parse_function_call", json=pythonic).json()["calls"] == answer["calls"]


@pytest.mark.parametrize("text", ["<think>a b</think>c", "a b</think>\n\nc"])
def test_reasoning_in_a_text(with_tools: httpx.Client, text: str) -> None:
    body = {"text": text, "reasoning_parser": "deepseek-r1"}
    assert with_tools.post("/separate_reasoning", json=body).json() == {"reasoning_text": "a b", "text": "c"}


def test_reasoning_in_gpt_oss_s_messages(with_tools: httpx.Client) -> None:
    text = "<|channel|>analysis<|message|>a b<|end|><|start|>assistant<|channel|>final<|message|>c<|return|>"
    body = {"text": text, "reasoning_parser": "gpt-oss"}
    assert with_tools.post("/separate_reasoning", json=body).json() == {"reasoning_text": "a b", "text": "c"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/parse_function_call", {"text": "x", "tools": TOOLS, "tool_call_parser": "nobody"}),
        ("/separate_reasoning", {"text": "x", "reasoning_parser": "nobody"}),
        ("/separate_reasoning", {"text": "x"}),
    ],
)
def test_a_parser_that_is_not_known(with_tools: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = with_tools.post(path, json=body)
    assert response.status_code == 400
    assert "deepseek" in response.json()["error"]["message"]


def test_tools_are_tokenized_too(with_tools: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"messages": messages, "tools": TOOLS}
    found = with_tools.post("/tokenize", json=body).json()["tokens"]
    template = ChatTemplate({"default": Path(QWEN).read_text()}, {})
    text = template.render(messages, tools=TOOLS, add_generation_prompt=True)
    assert "get_weather" in text
    assert found == TOKENIZER.encode(text)
