"""What a model says, as Anthropic's dialect sends it: the official client reads it from a real socket.

The model's tokens are given; no engine runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
from dataclasses import replace
from typing import Any

import anthropic
import pytest
from given_answers import ANSWER, FOUND, SILENT, choices_of, folded, pieces_of, served, steps_of
from pydantic import TypeAdapter
from scripted_server import serving, stream, whole

from octavo.server.bodies import validated
from octavo.server.dialects.anthropic import MessagesAnswer
from octavo.server.dialects.anthropic_request import CountTokensRequest, MessagesRequest, chat_of
from octavo.server.dialects.chat_request import ChatCompletionRequest
from octavo.server.dialects.conversation import render_request
from octavo.server.dialects.system_turns import SystemProbe, SystemTurns
from octavo.server.dialects.tools import shown_tools
from octavo.server.errors import ApiError
from octavo.server.message.format import ReasoningFormat
from octavo.server.message.infer import Inference
from octavo.server.message.presets import TOOL_PRESETS
from octavo.server.message.probe import History
from octavo.server.served_model import ServedModel
from octavo.text.template_process import Job

BOTH = SystemTurns(at_head=True, inline=True)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": name, "description": "d", "input_schema": SCHEMA} for name in ("get_weather", "get_time")]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 2000, "messages": [{"role": "user", "content": "Hi"}]}
KIND: TypeAdapter[MessagesRequest] = TypeAdapter(MessagesRequest)
COUNTED: TypeAdapter[CountTokensRequest] = TypeAdapter(CountTokensRequest)


def request(**fields: Any) -> MessagesRequest:
    body = {**BODY, "tools": TOOLS, **fields}
    given = {name: value for name, value in body.items() if value is not None}
    return validated(json.dumps(given).encode(), KIND)


def answer_to(body: MessagesRequest, model: ServedModel) -> MessagesAnswer:
    choices = choices_of(chat_of(body, BOTH, model), model)
    return MessagesAnswer(body, choices, model, [], "x")


def told(
    text: str, finish: str = "stop", size: int = 1, found: Inference = FOUND, **fields: Any
) -> tuple[anthropic.types.Message, anthropic.types.Message, list[Any]]:
    """The whole answer and the stream's, as the client has them, and the stream's events in its own types."""
    model = served(found)
    body = request(**fields)
    at_once = answer_to(body, model)
    in_steps = answer_to(body, model)
    answer = at_once.whole(folded(steps_of(at_once.choices, text, finish, size)))
    pieces = pieces_of(in_steps, steps_of(in_steps.choices, text, finish, size))
    with (
        serving(lambda asked: stream(pieces) if asked.json.get("stream") else whole(answer)) as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        message = client.messages.create(**BODY)
        with client.messages.stream(**BODY) as events:
            seen = list(events)
            final = events.get_final_message()
    return message, final, seen


def content(message: anthropic.types.Message) -> list[dict[str, Any]]:
    """The blocks; each call is made under an id of its own."""
    blocks = [block.model_dump(exclude_none=True) for block in message.content]
    ids = [block.pop("id") for block in blocks if block["type"] == "tool_use"]
    assert len(set(ids)) == len(ids)
    assert all(each.startswith("toolu_") for each in ids)
    for block in blocks:
        block.pop("parsed_output", None)
    return blocks


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


WEATHER = {"type": "tool_use", "name": "get_weather", "input": {"city": "Zürich", "days": [1, 2]}}
TIME = {"type": "tool_use", "name": "get_time", "input": {}}
THOUGHT = {"type": "thinking", "thinking": "hm, two calls", "signature": "octavo"}


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_adds_up_to_the_whole_answer(size: int) -> None:
    message, final, _ = told(ANSWER + "\nAnd then?", size=size)
    assert content(message) == [THOUGHT, text_block("I look."), WEATHER, TIME, text_block("And then?")]
    assert content(final) == content(message)
    assert (message.stop_reason, final.stop_reason) == ("tool_use", "tool_use")
    assert final.usage == message.usage
    assert final.usage.output_tokens_details is not None
    assert 0 < final.usage.output_tokens_details.thinking_tokens < final.usage.output_tokens
    assert (message.usage.cache_read_input_tokens, message.usage.cache_creation_input_tokens) == (3, 0)


def test_an_answer_that_was_ended_from_outside_is_an_error() -> None:
    at_once = answer_to(request(), served())
    with pytest.raises(ApiError, match="ended before it was complete") as caught:
        at_once.whole(folded(steps_of(at_once.choices, ANSWER, "abort", 3)))
    assert caught.value.body("/v1/messages")["error"]["type"] == "overloaded_error"
    in_steps = answer_to(request(), served())
    pieces = pieces_of(in_steps, steps_of(in_steps.choices, ANSWER, "abort", 3))
    with (
        serving(lambda _: stream(pieces)) as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
        client.messages.stream(**BODY) as events,
    ):
        with pytest.raises(anthropic.APIStatusError, match="ended before it was complete"):
            list(events)
        said = content(events.current_message_snapshot)
    assert said == [THOUGHT, text_block("I look."), WEATHER, TIME]  # what was said until then


@pytest.mark.parametrize("finish", ["length", "repetition"])
def test_an_answer_that_was_cut_says_so(finish: str) -> None:
    message, final, _ = told("Again. Again. Again.", finish)
    assert (message.stop_reason, final.stop_reason) == ("max_tokens", "max_tokens")


def test_the_events_come_in_order() -> None:
    model = served()
    answer = answer_to(request(), model)
    lines = b"".join(pieces_of(answer, steps_of(answer.choices, ANSWER, "stop", 1))).decode().strip().split("\n\n")
    events = []
    for line in lines:
        name, data = line.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] == len(answer.choices[0].request.token_ids) - 3
    index = -1
    kinds = []
    for before, event in itertools.pairwise(events[1:-2]):
        match event["type"]:
            case "content_block_start":
                index += 1
                kinds.append(event["content_block"]["type"])
                assert before["type"] in ("ping", "content_block_stop")
            case "content_block_stop" if kinds[-1] == "thinking":
                assert before["delta"]["type"] == "signature_delta"
        assert event["index"] == index
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["input"] for block in starts[2:]] == [{}, {}]


def test_an_engine_that_dies_in_mid_stream_is_an_error() -> None:
    model = served()
    answer = answer_to(request(), model)
    pieces = pieces_of(answer, steps_of(answer.choices, ANSWER, "stop", 1))[:5]
    broken = [*pieces, answer.framing.error(ApiError(503, "the engine is dead")), answer.framing.end]
    with (
        serving(lambda _: stream([piece for piece in broken if piece])) as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
        client.messages.stream(**BODY) as events,
        pytest.raises(anthropic.APIStatusError, match="the engine is dead") as caught,
    ):
        list(events)
    assert caught.value.type == "overloaded_error"


def test_nothing_said_is_one_empty_text() -> None:
    message, final, events = told("", found=SILENT)
    assert content(message) == content(final) == [text_block("")]
    assert [event.type for event in events].count("content_block_start") == 1
    assert message.stop_reason == final.stop_reason == "end_turn"


def test_a_call_that_is_cut_keeps_what_there_is() -> None:
    cut = ANSWER[: ANSWER.index(", 2]")]
    message, final, _ = told(cut, "length")
    assert content(message) == content(final)
    assert content(message)[-1] == WEATHER | {"input": {"city": "Zürich", "days": [1]}}
    assert (message.stop_reason, final.stop_reason) == ("max_tokens", "max_tokens")


def test_a_call_that_a_stop_string_cuts_is_no_tool_use() -> None:
    message, final, _ = told(ANSWER, stop_sequences=["rich"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "rich")
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "rich")
    assert content(message)[-1]["input"] == content(final)[-1]["input"] == {}


def test_the_end_of_the_context_is_told_from_the_limit() -> None:
    message, final, _ = told("Hello there", "length", max_tokens=32_000)
    assert message.stop_reason == final.stop_reason == "model_context_window_exceeded"
    model = served()
    [choice] = answer_to(request(max_tokens=32_000), model).choices
    assert choice.request.params.max_tokens == model.max_model_len - len(choice.request.token_ids)


def test_thoughts_are_left_out_where_they_are_not_wanted() -> None:
    message, final, _ = told(ANSWER, thinking={"type": "adaptive", "display": "omitted"})
    assert content(message)[0] == content(final)[0] == THOUGHT | {"thinking": ""}
    assert content(message)[1:] == [text_block("I look."), WEATHER, TIME]


def test_one_call_at_a_time() -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message, final, _ = told(ANSWER, tool_choice=choice)
    assert content(message) == content(final) == [THOUGHT, text_block("I look."), WEATHER]


CALL_ID = "toolu_0123456789abcdef01234567"
NOTES = {"type": "text", "media_type": "text/plain", "data": "dry"}
CHANNELS = Inference(TOOL_PRESETS["openai"], "inferred", None, "none", History())
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "I need a tool", "signature": "abc"},
            {"type": "redacted_thinking", "data": "xyz"},
            text_block("I look."),
            {
                "type": "tool_use",
                "id": "toolu_0123456789abcdef01234567",
                "name": "get_weather",
                "input": {"city": "Bern"},
            },
            {"type": "tool_use", "id": "other", "name": "get_time", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": CALL_ID, "content": [text_block("rain")]},
            {"type": "tool_result", "tool_use_id": "other", "content": "no clock", "is_error": True},
            {"type": "tool_result", "tool_use_id": "unknown"},
            {
                "type": "document",
                "title": "Notes",
                "source": {"type": "text", "media_type": "text/plain", "data": "dry"},
            },
        ],
    },
    {"role": "user", "content": "And now?"},
]


def turns(model: ServedModel | None = None, takes: SystemTurns = BOTH, **fields: Any) -> list[dict[str, Any]]:
    chat = chat_of(request(**fields), takes, model or served())
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def test_a_conversation_keeps_everything_that_was_said() -> None:
    billed = [text_block("x-anthropic-billing-header: cch=1"), text_block("Be brief."), text_block("Be kind.")]
    found = turns(system=billed, messages=CONVERSATION)
    assert found[0] == {"role": "system", "content": "Be brief.\nBe kind."}
    assert found[1] == {"role": "user", "content": "Weather?"}
    assert found[2]["content"] == "I look."
    assert found[2]["reasoning_content"] == "I need a tool"
    calls = [(call["id"], call["function"]) for call in found[2]["tool_calls"]]
    assert calls == [
        ("call_0123456789abcdef01234567", {"name": "get_weather", "arguments": '{"city":"Bern"}'}),
        ("other", {"name": "get_time", "arguments": "{}"}),
    ]
    results = [(turn["tool_call_id"], turn["content"], turn.get("name")) for turn in found[3:6]]
    assert results == [
        ("call_0123456789abcdef01234567", "rain", "get_weather"),
        ("other", "Error: no clock", "get_time"),
        ("unknown", "", None),
    ]
    [last] = found[6:]
    assert [part["text"] for part in last["content"]] == ["Notes\ndry", "And now?"]


def test_the_line_that_bills_is_dropped_whichever_way_it_comes() -> None:
    expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert turns(system="x-anthropic-billing-header: cch=1\nBe brief.") == expected
    assert turns(system="x-anthropic-billing-header: cch=1") == expected[1:]


def test_an_assistant_at_the_end_is_continued() -> None:
    messages = [*BODY["messages"], {"role": "assistant", "content": "The answer is"}]
    chat = chat_of(request(messages=messages), BOTH, served())
    assert (chat.continue_final_message, chat.add_generation_prompt) == (True, False)


INLINE = [
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "Two"},
    {"role": "system", "content": "The user is in a hurry."},
    {"role": "user", "content": "Three"},
]


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        ("octavo-qwen2.5-coder", SystemTurns(at_head=True, inline=True)),
        ("google-gemma-2-2b-it", SystemTurns(at_head=False, inline=False)),
        ("meta-llama-Llama-3.3-70B-Instruct", SystemTurns(at_head=True, inline=True)),
        ("Qwen3.5-4B", SystemTurns(at_head=True, inline=False)),
    ],
)
def test_system_messages_stand_where_the_template_takes_them(template: str, takes: SystemTurns) -> None:
    """All is in the prompt, and the beginning of the prompt stays as it was, so that its cache holds."""
    model = served(template=template)

    async def found() -> SystemTurns:
        try:
            return await SystemProbe(model).turns(has_tools=False)
        finally:
            model.renderer.stop("done")

    assert asyncio.run(found()) == takes

    def prompt(messages: list[dict[str, Any]], *, whole: bool) -> str:
        given = turns(model, takes, system="Be brief.", messages=messages, tools=None)
        return model.renderer.template.render(given, add_generation_prompt=whole)

    first = prompt(INLINE[:1], whole=False)
    text = prompt(INLINE, whole=True)
    places = [text.index(word) for word in ("Be brief.", "One", "Two", "The user is in a hurry.", "Three")]
    assert places == sorted(places)
    assert text.startswith(first.rstrip()[: len(first) // 2])


def test_a_system_message_without_a_turn_behind_it() -> None:
    never = SystemTurns(at_head=False, inline=False)
    last = [INLINE[0], INLINE[2]]
    assert turns(takes=never, messages=last) == [{"role": "user", "content": "One\n\nThe user is in a hurry."}]
    alone = turns(takes=never, messages=[*INLINE[:2], INLINE[2]])
    assert alone[-1] == {"role": "user", "content": "The user is in a hurry."}
    results = turns(takes=never, system="Be brief.", messages=[*CONVERSATION[:2], INLINE[2], *CONVERSATION[2:]])
    assert results[0] == {"role": "user", "content": "Be brief.\n\nWeather?"}
    assert [turn["role"] for turn in results] == ["user", "assistant", "tool", "tool", "tool", "user"]
    assert results[-1]["content"][0]["text"] == "The user is in a hurry."


@pytest.mark.parametrize(
    ("template", "behind_results"),
    [("octavo-qwen2.5-coder", True), ("mistralai-Mistral-Nemo-Instruct-2407", False), ("google-gemma-2-2b-it", True)],
)
def test_a_reminder_behind_results_reaches_the_model(template: str, behind_results: bool) -> None:
    """Mistral's templates refuse a user's turn there, and Claude Code puts one behind most results."""
    model = served(template=template)

    async def found() -> SystemTurns:
        try:
            return await SystemProbe(model).turns(has_tools=True)
        finally:
            model.renderer.stop("done")

    takes = asyncio.run(found())
    assert takes.behind_results == behind_results
    used = {"type": "tool_use", "id": "toolu_abcdef123", "name": "get_weather", "input": {"city": "Bern"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_abcdef123", "content": "rain"}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result, text_block("Be quick.")]},
    ]
    roles = [turn["role"] for turn in turns(model, takes, messages=messages)]
    assert roles == ["user", "assistant", "tool", *(["user"] if behind_results else [])]
    if template.startswith("google"):  # it knows no calls
        return
    chat = chat_of(request(messages=messages), takes, model)
    text = model.renderer.template.render(
        render_messages(chat, model), tools=shown_tools(chat, model), add_generation_prompt=True
    )
    assert 0 < text.index("rain") < text.index("Be quick.")


def render_messages(chat: ChatCompletionRequest, model: ServedModel) -> list[dict[str, Any]]:
    """The messages as the template gets them."""
    job: Job = pickle.loads(render_request(chat, model).frame)
    return job.messages


def test_a_system_message_for_one_turn_is_cleared() -> None:
    now = INLINE[2] | {"clear_at": "next_user_message"}
    assert [turn["role"] for turn in turns(messages=[*INLINE[:2], now, INLINE[3]])] == ["user", "assistant", "user"]
    assert [turn["role"] for turn in turns(messages=[*INLINE[:1], now])] == ["user", "system"]


def shown(**fields: Any) -> list[str]:
    model = served()
    tools = shown_tools(chat_of(request(**fields), BOTH, model), model)
    return [tool["function"]["name"] for tool in tools or ()]


def test_a_deferred_tool_is_shown_when_it_was_found() -> None:
    tools = [TOOLS[0], TOOLS[1] | {"defer_loading": True}]
    assert shown(tools=tools) == ["get_weather"]
    reference = {"type": "tool_reference", "tool_name": "get_time"}
    result = {"type": "tool_result", "tool_use_id": "other", "content": [reference]}
    found = [*CONVERSATION[:2], {"role": "user", "content": [result]}]
    assert shown(tools=tools, messages=found) == ["get_weather", "get_time"]
    change = {"tool": {"type": "tool_reference", "name": "get_time"}}
    added = {"role": "system", "content": [{"type": "tool_addition", **change}]}
    removed = {"role": "system", "content": [{"type": "tool_removal", **change}]}
    assert shown(tools=tools, messages=[*BODY["messages"], added]) == ["get_weather", "get_time"]
    assert shown(tools=tools, messages=[*found, removed]) == ["get_weather"]


def test_what_the_model_may_call() -> None:
    assert shown(tool_choice={"type": "none"}) == []
    assert shown(tool_choice={"type": "auto"}) == ["get_weather", "get_time"]
    typed = {"type": "bash_20250124", "name": "bash", "input_schema": SCHEMA}
    assert shown(tools=[typed]) == ["bash"]


def test_thinking_is_switched_by_the_template() -> None:
    def variables(**thinking: Any) -> Any:
        return chat_of(request(thinking=thinking), BOTH, served()).chat_template_kwargs

    assert variables(type="disabled") == {"enable_thinking": False}
    assert variables(type="enabled", budget_tokens=1024) == {"enable_thinking": True}
    assert variables(type="adaptive") is None


def test_thoughts_keep_to_their_budget() -> None:
    def budget(found: Inference, **thinking: Any) -> int | None:
        return chat_of(request(thinking=thinking), BOTH, served(found)).thinking_token_budget

    marked = replace(FOUND, reasoning=ReasoningFormat("<|im_start|>", "<|im_end|>"))
    assert budget(marked, type="enabled", budget_tokens=1024) == 1024
    assert budget(marked, type="adaptive") is None
    assert budget(marked, type="disabled") == 0  # there is no switch
    assert budget(SILENT, type="enabled", budget_tokens=1024) == 1024  # it thinks for 0 tokens
    assert budget(SILENT, type="disabled") is None
    for found in (replace(FOUND, reasoning=ReasoningFormat("<a>", "</a>")), CHANNELS):
        assert budget(found, type="disabled") == 0


def test_effort_is_the_template_s_or_a_hint() -> None:
    def variables(found: Inference, effort: str) -> Any:
        return chat_of(request(output_config={"effort": effort}), BOTH, served(found)).chat_template_kwargs

    assert variables(CHANNELS, "max") == {"reasoning_effort": "high"}
    assert variables(FOUND, "max") is None


DEFERRED = TOOLS[1] | {"defer_loading": True}
REMOVED = {"type": "tool_reference", "name": "get_weather"}
REMOVAL = {"role": "system", "content": [{"type": "tool_removal", "tool": REMOVED}]}


def said_by_user(*content_blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content_blocks)}]


MANY = {"type": "document", "source": {"type": "content", "content": [text_block("x")] * 17_000}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 1}, "temprature: octavo does not support this field"),
        ({"max_tokens": None}, "max_tokens: this field is missing"),
        ({"max_tokens": 0}, "max_tokens"),
        (
            {"messages": said_by_user({"type": "image", "source": {"type": "file", "file_id": "x"}})},
            "messages.0.content.0.source",
        ),
        ({"messages": said_by_user({"type": "thinking", "thinking": "x"})}, "messages.0: content.0: a block of type"),
        (
            {"messages": said_by_user({"type": "tool_result", "tool_use_id": "x", "content": [{"type": "video"}]})},
            "messages.0.content.0.content.0: octavo does not support blocks of type 'video'",
        ),
        (
            {"messages": said_by_user({"type": "document", "source": {"type": "url", "url": "http://x"}})},
            "messages.0.content.0.source: octavo reads documents of text only",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: octavo does not support the value 'tool'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0: tools of type 'web_search_2025"),
        ({"tools": [{"name": "x"}]}, "tools.0: input_schema is missing"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools: 'get_weather' stands there twice"),
        ({"tools": [tool | {"defer_loading": True} for tool in TOOLS]}, "tools: all of them have defer_loading"),
        ({"tools": None, "tool_choice": {"type": "any"}}, "tool_choice: 'any' needs tools"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: there is no tool 'x'"),
        (
            {
                "tools": [TOOLS[0], TOOLS[1] | {"defer_loading": True}],
                "tool_choice": {"type": "tool", "name": "get_time"},
            },
            "tool_choice.name: the tool 'get_time' may not be called by now",
        ),
        (
            {"tools": [TOOLS[0]], "tool_choice": {"type": "any"}, "messages": [*BODY["messages"], REMOVAL]},
            "tool_choice: no tool may be called by now",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, "thinking.budget_tokens"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            "thinking.budget_tokens 2000 must be less",
        ),
        ({"thinking": {"type": "enabled"}}, "thinking: budget_tokens goes with type"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers: octavo does not support this field"),
        ({"container": "x"}, "container: octavo does not support this field"),
        ({"stop_sequences": ["x"] * 33}, "stop_sequences"),
        ({"messages": BODY["messages"] * 16_385}, "messages: 16385 messages and blocks; 16384 is the most"),
        ({"messages": said_by_user(MANY)}, "messages: 17002 messages and blocks; 16384 is the most"),
    ],
)
def test_what_is_not_honored_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(request(**fields), BOTH, served())
    assert caught.value.status == 400
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("metadata", "user"), [({"user_id": "u"}, "u"), ({"user_id": 5}, ""), ({}, ""), ("u", ""), (None, "")]
)
def test_whose_request_it_is(metadata: Any, user: str) -> None:
    """--fair-by user goes by it."""
    assert chat_of(request(metadata=metadata), BOTH, served()).user_name == user


def test_a_count_needs_no_limit() -> None:
    body = {name: value for name, value in BODY.items() if name != "max_tokens"}
    asked = validated(json.dumps(body).encode(), COUNTED)
    assert chat_of(asked, BOTH, served()).messages[0].content == "Hi"
