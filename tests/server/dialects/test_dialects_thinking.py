"""Thinking through Anthropic's and Ollama's clients, of a real engine behind a template that opens the reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import pytest
from octavo_server import Server, serving

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.reasoning_content %}<|im_start|>{{ message.reasoning_content }}<|endoftext|>{% endif %}"
    "{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <|im_start|>{% endif %}"
)
ASK: list[Any] = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "messages": ASK, "extra_body": {"seed": 1}}


@pytest.fixture(scope="module")
def thinking() -> Iterator[Server]:
    with serving("--served-model-name", "tiny", "--chat-template", TEMPLATE) as server:
        yield server


@pytest.fixture
def official(thinking: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=thinking.url, api_key="none", max_retries=0) as client:
        yield client


def kinds(message: anthropic.types.Message) -> list[str]:
    return [block.type for block in message.content]


def test_a_model_without_sense_thinks_until_its_limit(official: anthropic.Anthropic) -> None:
    answer = official.messages.create(**BODY)
    with official.messages.stream(**BODY) as stream:
        final = stream.get_final_message()
    [block] = answer.content
    assert block.type == "thinking"
    assert final.content == answer.content
    assert answer.usage.output_tokens_details is not None
    assert answer.usage.output_tokens_details.thinking_tokens == answer.usage.output_tokens > 0
    assert final.usage == answer.usage.model_copy(
        update={
            "input_tokens": final.usage.input_tokens,
            "cache_read_input_tokens": final.usage.cache_read_input_tokens,
        }
    )


def test_where_the_template_has_no_switch_the_thoughts_end_before_they_begin(official: anthropic.Anthropic) -> None:
    answer = official.messages.create(**BODY, thinking={"type": "disabled"})
    assert kinds(answer) == ["text"]
    assert answer.usage.output_tokens_details is not None
    assert answer.usage.output_tokens_details.thinking_tokens == 0


def test_a_budget_is_taken_where_it_fits_the_limit(official: anthropic.Anthropic) -> None:
    budget = {"type": "enabled", "budget_tokens": 1024}
    answer = official.messages.create(**BODY | {"max_tokens": 2000}, thinking=budget)
    assert kinds(answer)[0] == "thinking"
    assert answer.usage.output_tokens_details is not None
    assert answer.usage.output_tokens_details.thinking_tokens <= 1024


def test_ollama_thinks_or_does_not(thinking: Server) -> None:
    options = {"num_predict": 12, "seed": 1}
    with ollama.Client(host=thinking.url) as client:
        on = client.chat("tiny", messages=ASK, think=True, options=options)
        off = client.chat("tiny", messages=ASK, think=False, options=options)
        pieces = list(client.chat("tiny", messages=ASK, think=True, options=options, stream=True))
        alone = client.generate("tiny", prompt="Hi", think=True, options=options)
        assert client.show("tiny").capabilities == ["completion", "thinking"]
    assert on.message.thinking
    assert not on.message.content
    assert "".join(piece.message.thinking or "" for piece in pieces) == on.message.thinking == alone.thinking
    assert off.message.content
    assert not off.message.thinking
