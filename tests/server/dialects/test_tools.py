"""Tool calls and reasoning as OpenAI's chat dialect sends them: OpenAI's own types must take every chunk, and what
they add up to is the whole answer. The model's tokens are given; no engine runs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
from typing import Any

import pytest
from byte_grammar import ByteGrammar
from pydantic import ValidationError
from spoken import (
    ALLOWED,
    ANSWER,
    FOUND,
    FUNCTIONS,
    NAMED,
    THINKS,
    TOKENIZER,
    TOOLS,
    answer_to,
    constrained,
    deltas,
    model,
    request,
    streamed,
    whole,
)
from templates import template

from octavo.runtime.messages import Constraint, Ready, Reasoning, StartupReport, TokenOutput, Triggers
from octavo.runtime.worker.grammar_masks import TOO_COMPLEX
from octavo.server.dialects.conversation import render_request
from octavo.server.dialects.tools import reading_of, shown_tools
from octavo.server.errors import ApiError
from octavo.server.message.format import ReasoningFormat
from octavo.server.message.infer import Inference
from octavo.server.message.model_formats import check_names, find_formats
from octavo.server.message.parts import text_of
from octavo.server.message.presets import CHANNEL_NAMES, TOOL_PRESETS
from octavo.server.message.probe import History
from octavo.server.metrics import Metrics
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.chat_template import ChatTemplate
from octavo.text.template_process import Job


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_stream_adds_up_to_the_whole_answer(step: int) -> None:
    said, reason = streamed(ANSWER, step=step)
    message, reason_of_whole = whole(ANSWER)
    assert reason == reason_of_whole == "tool_calls"
    assert said["reasoning"] == said["reasoning_content"] == message["reasoning"] == message["reasoning_content"]
    assert said["reasoning"] == "hm, two calls"
    assert said["content"] == message["content"] == "I look."
    calls = [call[1:] for call in said["calls"]]
    assert calls == [call[1:] for call in message["calls"]]
    assert calls == [["get_weather", '{"city":  "Zürich"}'], ["get_time", "{}"]]
    assert len({call[0] for call in said["calls"]}) == 2
    assert json.loads(calls[0][1]) == {"city": "Zürich"}


def test_content_is_null_where_there_are_only_calls() -> None:
    message, reason = whole(ANSWER[ANSWER.index("<tool_call>") :])
    assert (message["content"], reason, len(message["calls"])) == (None, "tool_calls", 2)
    assert "reasoning" not in message


def test_a_call_that_is_cut_says_length() -> None:
    text = ANSWER[: ANSWER.index("rich")]
    message, reason = whole(text, "length")
    assert (reason, message["calls"][0][2]) == ("length", '{"city":  "Zü')
    assert streamed(text, "length")[1] == "length"


def test_one_call_at_a_time() -> None:
    message, reason = whole(ANSWER, parallel_tool_calls=False)
    assert ([call[1] for call in message["calls"]], reason) == (["get_weather"], "tool_calls")
    assert [call[1] for call in streamed(ANSWER, step=5, parallel_tool_calls=False)[0]["calls"]] == ["get_weather"]


def test_without_tools_calls_are_text_and_reasoning_is_none() -> None:
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        message, reason = whole(ANSWER, **fields)
        assert (message["reasoning"], message["calls"], reason) == ("hm, two calls", [], "stop")
        assert message["content"] == ANSWER[ANSWER.index("I look") :]


def test_a_model_without_formats_is_read_as_text() -> None:
    served = model(Inference(None, "no template", None, "no template", History()))
    body = request(tools=None)
    assert reading_of("user: Hi", body, body.messages, served) is None
    with pytest.raises(ApiError, match="--tool-call-parser") as caught:
        shown_tools(request(), served)
    assert caught.value.status == 400


def test_the_prompt_shows_tools_and_past_calls_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": '{"city": "Rome"}'}}
    body = request(
        messages=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "9"},
        ]
    )
    served = model()
    sent = render_request(body, served, None, shown_tools(body, served))
    job: Job = pickle.loads(sent.frame)
    assert job.tools == TOOLS
    text = served.renderer.template.render(job.messages, tools=job.tools)
    assert '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert '"name": "get_weather"' in text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "'get_weather' stands there twice"),
        ({"tools": [{"type": "custom", "custom": {"name": "f", "format": {"type": "grammar"}}}]}, "grammar"),
        ({"tool_choice": {"type": "custom", "function": {"name": "get_time"}}}, "needs custom"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "name"),
        ({"tool_choice": "any"}, "'none', 'auto' or 'required'"),
        ({"tool_choice": "required", "tools": None}, "'required' needs tools"),
        ({"tools": None, "tool_choice": "auto"}, "needs tools"),
        ({"tool_choice": NAMED | {"function": {"name": "get"}}}, "'get' is none of the tools: get_weather, get_time"),
        ({"tool_choice": NAMED, "tools": None}, "'function' needs tools"),
        ({"tool_choice": ALLOWED | {"allowed_tools": {"mode": "none", "tools": [NAMED]}}}, "mode"),
        ({"tool_choice": ALLOWED | {"allowed_tools": {"mode": "auto", "tools": []}}}, "tools"),
        ({"functions": FUNCTIONS}, "the older name of tools"),
        ({"function_call": {"name": "get_time"}}, "needs functions"),
        ({"tools": None, "functions": FUNCTIONS, "function_call": {"name": "x"}}, "function_call: 'x' is none of"),
        ({"tools": None, "functions": [*FUNCTIONS, *FUNCTIONS]}, "'get_weather' stands there twice"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        request(**fields)


def test_parsers_are_known_by_name() -> None:
    check_names("hermes", "deepseek_r1")
    check_names(None, "auto")
    check_names("openai", "openai_gptoss")
    with pytest.raises(ValueError, match=r"--tool-call-parser 'nobody'.*hermes"):
        check_names("nobody", None)


@pytest.mark.parametrize("name", CHANNEL_NAMES)
def test_the_name_of_gpt_oss_s_reasoning_names_its_messages(name: str) -> None:
    """The peers have one flag for its calls and one for its reasoning, and its channels tell both."""
    found = asyncio.run(find_formats(TemplateRenderer(ChatTemplate({}, {})), {}, None, name)).found
    assert (found.tools, found.reasoning) == (TOOL_PRESETS["openai"], None)


@pytest.mark.parametrize(
    ("name", "to_arguments"),
    [
        ("mistralai-Ministral-3-14B-Reasoning-2512", "[ARGS]"),
        ("Mistral-Small-3.2-24B-Instruct-2506", "[CALL_ID]{id}[ARGS]"),
        ("mistralai-Mistral-Nemo-Instruct-2407", '", "arguments": '),
        ("octavo-smollm2", "[ARGS]"),
    ],
)
def test_mistral_s_name_is_that_of_several_formats(name: str, to_arguments: str) -> None:
    """The template tells which of them; without one, or with another model's, it is the latest."""
    renderer = TemplateRenderer(template(name))
    renderer.start()

    async def find() -> Inference:
        try:
            return (await find_formats(renderer, {}, "mistral")).found
        finally:
            renderer.stop("the test ends")

    found = asyncio.run(find())
    assert found.tools is not None
    assert found.tools.name_to_arguments == to_arguments
    assert found.tools_from.startswith("--tool-call-parser mistral")


def test_a_constraint_holds_behind_the_reasoning_that_the_prompt_has_opened() -> None:
    end = TOKENIZER.token_id("<|im_end|>")
    opened = constrained(THINKS, "go on<|im_start|>").choices[0].request.params.constraint
    closed = constrained(THINKS, "go on<|im_end|>").choices[0].request.params.constraint
    assert opened is not None
    assert closed is not None
    begin = TOKENIZER.token_id("<|im_start|>")
    assert begin is not None
    assert end is not None
    assert (opened.reasoning, closed.reasoning) == (Reasoning((end,), is_open=True), None)


def test_a_constraint_behind_reasoning_whose_end_is_no_token() -> None:
    """Its grammar describes the reasoning too, whose end may stand within a token."""
    thinks = Inference(None, "none", ReasoningFormat("<a>", "</a>", is_implied=True), "", History())
    choice: dict[str, Any] = {"response_format": None, "tools": None, "structured_outputs": {"choice": ["yes"]}}
    found = constrained(thinks, "x", **choice).choices[0].request.params.constraint
    assert found is not None
    assert found.reasoning == Reasoning(("</a>",), is_open=True, in_grammar=True)
    grammar = ByteGrammar(found.grammar)
    for text, is_valid in (("so <a> </b> </a>\nyes", True), ("</a>yes", True), ("yes", False), ("hm</a> no", False)):
        assert grammar.accepts(text) == is_valid, text
    free = dataclasses.replace(thinks, reasoning=ReasoningFormat("<a>", "</a>"))
    begins = constrained(free, "x", **choice).choices[0].request.params.constraint
    assert begins is not None
    grammar = ByteGrammar(begins.grammar)
    for text, is_valid in (("yes", True), ("\n<a>so</a>yes", True), ("so</a>yes", False), ("<a>yes", False)):
        assert grammar.accepts(text) == is_valid, text


def test_an_answer_obeys_its_constraint_or_calls() -> None:
    for name in ("hermes", "llama3_json", "functionary_v3_2", "pythonic"):
        answer = constrained(dataclasses.replace(FOUND, tools=TOOL_PRESETS[name]), "x", tools=TOOLS)
        found = answer.choices[0].request.params.constraint
        assert found is not None
        assert found.triggers is None
        assert found.reasoning is not None
    grammar = {"response_format": None, "structured_outputs": {"grammar": 'start: "{" /.*/'}}
    bare = dataclasses.replace(FOUND, tools=TOOL_PRESETS["llama3_json"])
    with pytest.raises(ApiError, match="must be a JSON Schema, a regular expression or a choice"):
        constrained(bare, "x", tools=TOOLS, **grammar)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"response_format": None, "structured_outputs": {"regex": "a+"}}, "structured_outputs.regex"),
        ({"response_format": None, "tools": TOOLS}, "tools"),
        ({}, "response_format"),
    ],
)
def test_a_grammar_that_fails_in_the_engine_is_told_by_its_field(fields: dict[str, Any], place: str) -> None:
    answer = constrained(FOUND, "x", **fields)
    failed = TokenOutput("a", [], finish_reason="error", error=TOO_COMPLEX.format("fuel"), is_refused=True)
    with pytest.raises(ApiError, match=f"^{place}: the answer's grammar .* work") as caught:
        answer.choices[0].take(failed)
    assert (caught.value.status, caught.value.param) == (400, place.partition(".")[0])


def test_whitespace_in_front_of_a_constrained_answer_is_none_of_it() -> None:
    """The model may have written it in front of reasoning that it left out."""
    for text in ("\n{}", "\n<think>\nhm</think>\n\n{}", "{}"):
        answer = constrained(FOUND, "x")
        assert text_of([part for delta in deltas(answer, text) for part in delta.parts]) == "{}"


def constraint_for(found: Inference = FOUND, **fields: Any) -> Constraint:
    asked = constrained(found, "x", response_format=None, tools=TOOLS, **fields).choices[0].request.params.constraint
    assert asked is not None
    return asked


def test_calls_are_constrained_by_default() -> None:
    auto = constraint_for()
    assert auto.triggers == Triggers(texts=("<tool_call>",), start="{")
    one = constraint_for(parallel_tool_calls=False)
    assert one.triggers == Triggers(texts=("<tool_call>",), start="{", once=True)
    assert constraint_for(tool_choice="required").triggers is None
    for choice in (NAMED, ALLOWED):
        grammar = constraint_for(tool_choice=choice).grammar
        assert "get_time" in grammar
        assert "get_weather" not in grammar


def test_how_an_answer_with_calls_ends() -> None:
    """As OpenAI's own: the model's decision to call is said, and the client's isn't."""
    one = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'
    for choice, expected in (
        ("auto", "tool_calls"),
        ("required", "tool_calls"),
        (ALLOWED, "tool_calls"),
        (NAMED, "stop"),
    ):
        message, reason = whole(one, tool_choice=choice)
        assert (len(message["calls"]), reason) == (1, expected)
        assert streamed(one, tool_choice=choice)[1] == expected
        assert whole(one, "length", tool_choice=choice)[1] == "length"


def test_functions_are_tools_by_their_older_name() -> None:
    one = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'
    called = {"name": "get_time", "arguments": '{"city": "Rome"}'}
    old: dict[str, Any] = {"tools": None, "functions": FUNCTIONS}
    message, reason = whole(one, **old)
    assert (message["function_call"], reason) == (called, "function_call")
    assert whole(one, **old, function_call={"name": "get_time"})[1] == "stop"
    answer = answer_to(request(**old))
    said = [chunk["choices"][0]["delta"] for delta in deltas(answer, one) for chunk in answer.chunks(delta)]
    pieces = [fields["function_call"] for fields in said if "function_call" in fields]
    assert pieces[0] == {"name": "get_time", "arguments": ""}
    assert "".join(piece["arguments"] for piece in pieces) == called["arguments"]
    served = model()
    assert shown_tools(request(**old), served) == TOOLS
    assert request(**old, function_call="none").callable_tools == []


def test_a_strict_tool_whose_schema_can_not_be_enforced_is_refused() -> None:
    function = {"name": "f", "parameters": {"properties": {"a": {"not": {"pattern": "x"}}}}, "strict": True}
    tools = [TOOLS[0], {"type": "function", "function": function}]
    with pytest.raises(ApiError, match=r"tools\.1\.function\.parameters: /properties/a/not") as caught:
        constrained(FOUND, "x", response_format=None, tools=tools)
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_calls_that_can_not_be_read_are_counted() -> None:
    broken = 'So <tool_call>\n["get_time"]\n</tool_call>'
    answer = answer_to(request())
    said = "".join(part.text for delta in deltas(answer, broken) for part in delta.parts)
    assert said == broken
    assert answer.choices[0].parser.num_malformed == 1
    facts = StartupReport("tiny", "", "", "", "", [], 0, 0, {})
    metrics = Metrics("tiny", Ready(64, 4, 16, 1024, facts), [{}])
    metrics.unparsed_calls(answer.choices[0].parser.num_malformed)
    assert b'octavo:tool_call_unparsed_total{engine="0",model_name="tiny"} 1.0' in metrics.page()


def test_a_call_that_is_cut_within_its_name_is_left_out() -> None:
    text = 'So <tool_call>\n{"name": "get_ti'
    message, reason = whole(text, "length")
    assert (message["content"], message["calls"], reason) == ("So", [], "length")
    message, reason = whole(text + 'me"', "length")
    assert (message["content"], [call[1:] for call in message["calls"]], reason) == ("So", [["get_time", ""]], "length")
    assert whole(text)[0]["content"] == text  # the model has ended it, so that it is no call
