"""What requests say about reasoning: how much of it, how long, and what of it is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import openai
import pytest
from octavo_server import serving
from slow_cases import slow
from spoken import ANSWER, THINKS, TOKENIZER, TOOLS, answer_to, constrained, deltas, model, request, streamed, whole
from templates import template

from octavo.runtime.messages import Reasoning
from octavo.server.dialects.thinking import effort_variables
from octavo.server.errors import ApiError
from octavo.server.generation import usage_of
from octavo.server.message.format import ReasoningFormat
from octavo.server.message.infer import Inference
from octavo.server.message.parts import reasoning_of, text_of
from octavo.server.message.presets import TOOL_PRESETS
from octavo.server.message.probe import History

THINK = ReasoningFormat("<think>", "</think>")
NO_REASONING = Inference(None, "none", None, "none", History())


def found(**changes: Any) -> Inference:
    return dataclasses.replace(NO_REASONING, reasoning=dataclasses.replace(THINK, **changes))


EFFORT = found(switch="reasoning_effort")
SWITCH = found(switch="enable_thinking", can_disable=True)
CHANNELS = dataclasses.replace(NO_REASONING, tools=TOOL_PRESETS["openai"])


@pytest.mark.parametrize(
    ("known", "effort", "variables"),
    [
        (NO_REASONING, "high", {}),
        (NO_REASONING, "none", {}),
        (EFFORT, "minimal", {"reasoning_effort": "low"}),
        (EFFORT, "max", {"reasoning_effort": "high"}),
        (CHANNELS, "medium", {"reasoning_effort": "medium"}),
        (SWITCH, "none", {"enable_thinking": False}),
        (SWITCH, "low", {"enable_thinking": True}),
        (SWITCH, None, {}),
    ],
)
def test_effort_is_the_template_s_variable(known: Inference, effort: str | None, variables: dict[str, Any]) -> None:
    assert effort_variables(request(reasoning_effort=effort), model(known)) == variables


@pytest.mark.parametrize(
    ("known", "effort"), [(found(), "low"), (found(), "none"), (CHANNELS, "none"), (EFFORT, "none")]
)
def test_an_effort_that_the_template_can_not_say_is_refused(known: Inference, effort: str) -> None:
    with pytest.raises(ApiError, match=r"reasoning_effort: ") as caught:
        effort_variables(request(reasoning_effort=effort), model(known))
    assert (caught.value.status, caught.value.param) == (400, "reasoning_effort")


@pytest.mark.parametrize("field", ["thinking_token_budget", "max_thinking_tokens"])
def test_a_budget_ends_the_reasoning_by_its_end(field: str) -> None:
    end = TOKENIZER.token_id("<|im_end|>")
    begin = TOKENIZER.token_id("<|im_start|>")
    assert end is not None
    assert begin is not None
    free = {"response_format": None, field: 7}
    opened = constrained(THINKS, "go on<|im_start|>", **free).choices[0].request.params.constraint
    assert opened is not None
    assert (opened.grammar, opened.reasoning) == ("", Reasoning((end,), True, (), 7, (end,)))
    closed = constrained(THINKS, "go on<|im_end|>", **free).choices[0].request.params.constraint
    assert closed is not None
    assert closed.reasoning == Reasoning((end,), False, (begin,), 7, (end,))
    assert constrained(NO_REASONING, "x", **free).choices[0].request.params.constraint is None


def test_a_budget_where_the_end_is_no_token() -> None:
    """All tokens of the marker are forced; the grammar of a constrained answer describes it too."""
    sent = constrained(found(is_implied=True), "x", response_format=None, thinking_token_budget=7)
    asked = sent.choices[0].request.params.constraint
    assert asked is not None
    assert (asked.grammar, asked.reasoning) == (
        "",
        Reasoning(("</think>",), True, (), 7, tuple(TOKENIZER.encode("</think>")), in_grammar=True),
    )


def test_a_budget_where_channels_tell_the_reasoning() -> None:
    """gpt-oss's analysis comes once and first, and its end is forced; without a budget it thinks as it likes."""
    for tools in (None, TOOLS):
        fields: dict[str, Any] = {"response_format": None, "tools": tools}
        asked = constrained(CHANNELS, "x", **fields, thinking_token_budget=7).choices[0].request.params.constraint
        assert asked is not None
        reasoning = asked.reasoning
        assert reasoning is not None
        assert ("".join(map(str, reasoning.begin)), reasoning.budget) == ("<|channel|>analysis<|message|>", 7)
        assert TOKENIZER.decode(reasoning.closing) == "<|end|>"
        assert reasoning.in_grammar
        never = constrained(CHANNELS, "x", **fields, thinking_token_budget=0).choices[0].request.params.constraint
        assert never is not None
        assert never.reasoning is None
        assert "analysis" not in never.grammar
    assert constrained(CHANNELS, "x", response_format=None).choices[0].request.params.constraint is None


def test_reasoning_is_left_out_where_nobody_wants_it() -> None:
    said, reason = streamed(ANSWER, include_reasoning=False)
    message, _ = whole(ANSWER, include_reasoning=False)
    assert (said["reasoning"], "reasoning" in message, reason) == ("", False, "tool_calls")
    assert said["content"] == message["content"] == "I look."


def test_reasoning_in_the_content() -> None:
    message, _ = whole(ANSWER, separate_reasoning=False)
    assert "reasoning" not in message
    assert message["content"] == ANSWER[: ANSWER.index("\n<tool_call>")]
    assert len(message["calls"]) == 2


def test_reasoning_in_one_piece() -> None:
    answer = answer_to(request(stream_reasoning=False))
    said = [chunk["choices"][0]["delta"] for delta in deltas(answer, ANSWER) for chunk in answer.chunks(delta)]
    assert [fields["reasoning"] for fields in said if "reasoning" in fields] == ["hm, two calls"]
    cut = answer_to(request(stream_reasoning=False))
    said = [chunk["choices"][0]["delta"] for delta in deltas(cut, ANSWER[:12], "length") for chunk in cut.chunks(delta)]
    assert [fields["reasoning"] for fields in said if "reasoning" in fields] == [ANSWER[8:12]]


def test_reasoning_tokens_are_counted() -> None:
    answer = answer_to(request())
    total = sum(len(delta.token_ids) for delta in deltas(answer, ANSWER))
    usage = usage_of(answer.choices)
    assert usage.reasoning_tokens is not None
    assert 0 < len(TOKENIZER.encode("hm, two")) <= usage.reasoning_tokens < total
    assert usage.as_json()["completion_tokens_details"] == {"reasoning_tokens": usage.reasoning_tokens}


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.reasoning_content %}<|im_start|>{{ message.reasoning_content }}<|endoftext|>{% endif %}"
    "{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <|im_start|>{% endif %}"
)


@pytest.mark.parametrize(
    ("begin", "end"), [("<|im_start|>", "<|endoftext|>"), slow("[My thoughts are:]", "[My answer is:]")]
)
def test_a_budget_in_a_real_answer(tmp_path: Path, begin: str, end: str) -> None:
    """A random model would hardly end its thoughts by itself; at its budget it does, with the sentence before."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE.replace("<|im_start|>", begin).replace("<|endoftext|>", end))
    config = '{"reasoning_end_str": "Enough."}'
    flags = ("--served-model-name", "tiny", "--chat-template", str(template), "--reasoning-config", config)
    with serving(*flags) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        for budget in (0, 5):
            answer = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=40,
                seed=1,
                extra_body={"thinking_token_budget": budget},
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens_details is not None
            reasoning = answer.choices[0].message.reasoning  # type: ignore[attr-defined]
            assert reasoning.endswith("Enough.")
            spent = answer.usage.completion_tokens_details.reasoning_tokens
            end_length = len(TOKENIZER.encode("Enough." + end)) - 1
            assert spent == budget + end_length
            assert answer.choices[0].message.content


@pytest.mark.parametrize(
    ("begun", "asked", "said", "thought", "content"),
    [
        ("<think>\nOkay", "Hi", " so</think>\n\nyes", " so", "yes"),
        ("<think>\nOkay", "What does <think> mean?", " so</think>\n\nyes", " so", "yes"),
        ("Paris is", "What does <think> mean?", " big", None, " big"),
    ],
)
@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "Qwen3.5-4B", "HuggingFaceTB-SmolLM3-3B"])
def test_a_thought_that_the_client_has_begun_goes_on(
    name: str, begun: str, asked: str, said: str, thought: str | None, content: str
) -> None:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": begun}]
    prompt = template(name).render(messages, add_generation_prompt=False, continue_final_message=True)
    body = request(messages=messages, tools=None, add_generation_prompt=False, continue_final_message=True)
    answer = answer_to(body, prompt)
    [choice] = answer.choices
    parts = [part for delta in deltas(answer, said) for part in delta.parts]
    assert (reasoning_of(parts) or None, text_of(parts)) == (thought, content)
    assert bool(choice.parser.num_reasoning) == (thought is not None)
