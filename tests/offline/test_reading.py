"""Answers that are told apart: what they say as reasoning, content and calls, beside their text."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from octavo_server import TINY, serving

from octavo import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams, StructuredOutputsParams
from octavo.outputs import CompletionOutput, ToolCall

PARSERS = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
THINKS = "{% for message in messages %}{{ message.content }}\n{% endfor %}<think>\n"  # a template that begins a thought
CHAT = [{"role": "user", "content": "Say hello."}]
CALL = r'<tool_call>\n\{"name": "f", "arguments": \{"a": [0-9]\}\}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
PROMPTS = ["The capital of", "def f(x):\n", "日本", "naïve café “"]


@pytest.fixture(scope="module")
def reader(forked: None, small: dict[str, Any]) -> Iterator[LLM]:  # noqa: ARG001
    with LLM(str(TINY), **PARSERS, **small) as found:
        yield found


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 60} | fields)


def only(outputs: list[RequestOutput]) -> CompletionOutput:
    ((answer,),) = [output.outputs for output in outputs]
    return answer


def of(regex: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=regex)


def test_a_constraint_holds_behind_the_thoughts_as_a_servers_does(reader: LLM) -> None:
    asked = params(structured_outputs=of("[g-m]{2}"), thinking_token_budget=5)
    answer = only(reader.chat(CHAT, asked, chat_template=THINKS))
    assert re.fullmatch("[g-m]{2}", answer.content or "")
    assert answer.reasoning
    assert answer.tool_calls == []
    assert answer.text.startswith(answer.reasoning)
    assert re.fullmatch(r"\s*</think>\s*[g-m]{2}", answer.text.removeprefix(answer.reasoning))
    body = {"messages": CHAT, "temperature": 0, "structured_outputs": {"regex": "[g-m]{2}"}, "thinking_token_budget": 5}
    flags = [word for name, value in PARSERS.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags += ["--trust-request-chat-template", "--served-model-name", "tiny"]
    with serving(*flags) as server, server.client() as client:
        response = client.post("/v1/chat/completions", json={"model": "tiny", **body, "chat_template": THINKS})
    message = response.json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (answer.reasoning, answer.content)


def test_a_prompt_that_the_program_has_rendered_is_read_too(reader: LLM) -> None:
    asked = params(structured_outputs=of("[g-m]{2}"), thinking_token_budget=5)
    chat = reader.chat(CHAT, asked, chat_template=THINKS)
    text, ids = chat[0].prompt, chat[0].prompt_token_ids
    for prompt in (text, ids):
        assert reader.generate(prompt, asked)[0].outputs == chat[0].outputs


def test_calls_are_told(reader: LLM) -> None:
    answer = only(reader.chat(CHAT, params(structured_outputs=of(CALL)), tools=TOOLS))
    assert re.fullmatch(CALL, answer.text)
    (call,) = answer.tool_calls or []
    assert isinstance(call, ToolCall)
    assert (call.name, answer.content, answer.reasoning) == ("f", "", None)
    assert call.id
    assert set(json.loads(call.arguments)) == {"a"}


def test_the_text_is_what_it_is_without_a_parser(reader: LLM, llm: LLM) -> None:
    for fields in ({}, {"stop": ["e", "a"]}, {"skip_special_tokens": False}, {"n": 2, "temperature": 1.0, "seed": 3}):
        asked = params(**fields)
        read = reader.generate(PROMPTS, asked)
        plain = llm.generate(PROMPTS, asked)
        assert [[it.text for it in output.outputs] for output in read] == [
            [it.text for it in output.outputs] for output in plain
        ]
        assert all(it.content is not None for output in read for it in output.outputs)
        assert all((it.content, it.tool_calls) == (None, None) for output in plain for it in output.outputs)


def test_a_template_without_calls_leaves_all_of_it_content(forked: None, small: dict[str, Any]) -> None:  # noqa: ARG001
    with LLM(str(TINY), tool_call_parser="auto", **small) as llm:
        answer = only(llm.chat(CHAT, params(max_tokens=4), tools=TOOLS))
    assert (answer.content, answer.reasoning, answer.tool_calls) == (answer.text, None, [])


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_stream_tells_them_at_its_end(forked: None, small: dict[str, Any], seconds: float) -> None:  # noqa: ARG001
    """Also to a reader that is slower than the steps, who is told several of them together."""
    asked = params(structured_outputs=of("[g-m]{2}"), thinking_token_budget=5)

    async def read(kind: RequestOutputKind) -> list[CompletionOutput]:
        asked.output_kind = kind
        found = []
        async with AsyncLLM(str(TINY), **PARSERS, **small) as llm:
            async for output in llm.generate("Hello\n<think>\n", asked, "a"):
                found.append(output.outputs[0])
                await asyncio.sleep(seconds)
        return found

    *before, last = asyncio.run(read(RequestOutputKind.DELTA))
    assert all(it.content is None for it in before)
    assert re.fullmatch("[g-m]{2}", last.content or "")
    assert last.reasoning
    text = "".join(it.text for it in [*before, last])
    assert text.startswith(last.reasoning)
    assert text.endswith(last.content or "-")


def test_a_budget_needs_a_parser(llm: LLM, forked: None, small: dict[str, Any]) -> None:  # noqa: ARG001
    with pytest.raises(ValueError, match=r"thinking_token_budget: LLM\(\.\.\., reasoning_parser"):
        llm.generate("a", params(thinking_token_budget=4))
    assert only(llm.generate("a", params(thinking_token_budget=-1, max_tokens=2))).reasoning is None
