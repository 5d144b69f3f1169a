"""Items and events of /v1/responses, from tokens that are given: no engine runs. OpenAI's own types take every event,
and OpenAI's own accumulator adds them up to what the whole answer is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Any

import pytest
from given_answers import TOKENIZER, choices_of, served
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError

from octavo.runtime.messages import Logprobs, TokenOutput
from octavo.server.dialects.responses_answer import ResponseAnswer
from octavo.server.dialects.responses_items import messages_of, plain_items, response_of_item, seal
from octavo.server.dialects.responses_request import ResponsesRequest, chat_request
from octavo.server.errors import ApiError
from octavo.server.generation import Choice, Delta, Steps
from octavo.server.hints import hints_in
from octavo.server.store import StoreError

Json = dict[str, Any]

RESPONSE_ID = "resp_" + "0123456789abcdef" * 2
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOLS: list[Json] = [
    {"type": "function", "name": "get_time", "parameters": {"type": "object"}, "strict": False},
    {
        "type": "namespace",
        "name": "weather",
        "description": "d",
        "tools": [{"type": "function", "name": "get", "parameters": {"type": "object"}}],
    },
    {"type": "web_search", "external_web_access": False},
]
CALLS = (
    '<tool_call>\n{"name": "weather__get", "arguments": {"city":  "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)
ANSWER = f"<think>\nhm, two calls\n</think>\n\nI look.\n{CALLS}"


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"input": "Hi", "tools": TOOLS} | fields)


def answer_to(body: ResponsesRequest) -> ResponseAnswer:
    model = served()
    chat = chat_request(body, messages_of(plain_items(body.input, RESPONSE_ID), body.instructions))
    return ResponseAnswer(body, choices_of(chat, model), model, RESPONSE_ID, stores=True)


def deltas(choice: Choice, text: str, finish: str = "stop", step: int = 1) -> list[Delta]:
    ids = TOKENIZER.encode(text)
    found = []
    for start in range(0, len(ids), step):
        now = ids[start : start + step]
        logprobs = [Logprobs(token_id, -0.5, 1, [token_id], [-0.5]) for token_id in now]
        output = TokenOutput(
            choice.request.request_id,
            now,
            finish if start + step >= len(ids) else None,  # type: ignore[arg-type]
            num_cached_tokens=0 if start == 0 else None,
            logprobs=logprobs,
        )
        found.append(choice.take(output))
    return found


async def given(steps: Sequence[Delta], error: ApiError | None = None) -> Steps:
    for delta in steps:
        yield [delta]
    if error is not None:
        raise error


def decoded(log: bytes) -> list[Json]:
    """The events of a stream. Each is named by its own type, and they are numbered without a gap."""
    assert log.endswith(b"\n\n")
    events = []
    for piece in log[:-2].split(b"\n\n"):
        name, data = piece.split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def _joined(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([piece async for piece in pieces])


def streamed(
    text: str, finish: str = "stop", step: int = 1, error: ApiError | None = None, **fields: Any
) -> list[Json]:
    answer = answer_to(request(stream=True, **fields))
    sent = asyncio.run(_joined(answer.events(given(deltas(answer.choices[0], text, finish, step), error))))
    assert b"".join(answer.log) == sent
    return decoded(sent)


def whole(text: str, finish: str = "stop", **fields: Any) -> Json:
    answer = answer_to(request(**fields))
    return asyncio.run(answer.complete(given(deltas(answer.choices[0], text, finish))))


def kinds(events: Sequence[Json]) -> list[str]:
    """The types, successive deltas of a kind as one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for place, name in enumerate(names) if not (name.endswith(".delta") and name == names[place - 1])]


def without_call_ids(items: Sequence[Json]) -> list[Json]:
    return [{name: value for name, value in item.items() if name != "call_id"} for item in items]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_the_order_of_events(step: int) -> None:
    message = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    thought = ["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    items = [["output_item.added", *one, "output_item.done"] for one in (thought, message, call, call)]
    assert kinds(streamed(ANSWER, step=step)) == ["created", "in_progress", *chain(*items), "completed"]


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("text", [ANSWER, CALLS, "only text", "<think>\nonly thought"])
def test_the_official_accumulator_comes_to_the_whole_answer(text: str, step: int) -> None:
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    events = streamed(text, step=step)
    for event in events:
        state.handle_event(EVENTS.validate_python(event))
    completed = state._completed_response
    assert completed is not None
    response = whole(text)
    Response.model_validate(response)
    assert without_call_ids(events[-1]["response"]["output"]) == without_call_ids(response["output"])
    added = {event["output_index"]: event["item"] for event in events if event["type"].endswith("item.added")}
    done = [event["item"] for event in events if event["type"].endswith("item.done")]
    assert done == events[-1]["response"]["output"]
    for place, item in enumerate(done):
        assert {name: added[place].get(name) for name in ("id", "type", "call_id", "name")} == {
            name: item.get(name) for name in ("id", "type", "call_id", "name")
        }
        said = [
            event["delta"]
            for event in events
            if event["type"].endswith(".delta") and (event["output_index"], event["item_id"]) == (place, item["id"])
        ]
        assert "".join(said) == (item["arguments"] if "arguments" in item else item["content"][0]["text"])


def test_what_the_items_say() -> None:
    thought, message, first, second = whole(ANSWER)["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm, two calls"}]
    assert (thought["summary"], "encrypted_content" in thought) == ([], False)
    assert message["content"] == [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]
    assert (first["namespace"], first["name"], first["arguments"]) == ("weather", "get", '{"city":  "Zürich"}')
    assert ("namespace" in second, second["name"], second["arguments"]) == (False, "get_time", "{}")
    assert first["call_id"] != second["call_id"]
    assert {item["status"] for item in (thought, message, first, second)} == {"completed"}
    assert [item["id"][: item["id"].index("_")] for item in (thought, message, first, second)] == [
        "rs", "msg", "fc", "fc"
    ]  # fmt: skip
    assert {response_of_item(item["id"]) for item in (thought, message, first, second)} == {RESPONSE_ID}


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    answer = answer_to(request(tools=None))
    [choice] = answer.choices
    output = TokenOutput(choice.request.request_id, [], "stop", num_cached_tokens=0)
    [item] = asyncio.run(answer.complete(given([choice.take(output)])))["output"]
    assert (item["type"], item["content"][0]["text"], item["status"]) == ("message", "", "completed")


def test_what_is_cut_is_incomplete() -> None:
    text = ANSWER[: ANSWER.index("rich")]
    response = whole(text, "length")
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in response["output"]] == ["completed", "completed", "incomplete"]
    assert response["output"][-1]["arguments"] == '{"city":  "Zü'
    last = streamed(text, "length")[-1]
    assert (last["type"], without_call_ids(last["response"]["output"])) == (
        "response.incomplete",
        without_call_ids(response["output"]),
    )
    # a stop string within a call is no end of it
    assert [item["status"] for item in whole(text)["output"]] == ["completed", "completed", "incomplete"]


@pytest.mark.parametrize(("status", "code"), [(503, "server_error"), (400, "invalid_prompt")])
def test_an_error_on_the_way_is_told_with_the_whole_response(status: int, code: str) -> None:
    events = streamed("I look", error=ApiError(status, "the engine is gone"))
    last = EVENTS.validate_python(events[-1])
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert events[-1]["response"]["error"] == {"code": code, "message": "the engine is gone"}
    assert last.response.output[0].content[0].text == "I look"


def test_an_answer_that_was_ended_from_outside_has_failed() -> None:
    events = streamed("I look", "abort")
    last = EVENTS.validate_python(events[-1])
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert last.response.output[0].content[0].text == "I look"
    with pytest.raises(ApiError, match="ended before it was complete") as caught:
        whole("I look", "abort")
    assert caught.value.status == 503


def test_an_answer_that_repeats_itself_is_incomplete() -> None:
    response = whole("Again. Again.", "repetition")
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert streamed("Again. Again.", "repetition")[-1]["type"] == "response.incomplete"


def test_a_response_that_can_not_be_stored_has_failed() -> None:
    kept: list[list[bytes]] = []

    def fail(_: ResponseAnswer, events: list[bytes]) -> Future[None]:
        kept.append(events)
        failed: Future[None] = Future()
        failed.set_exception(StoreError("the disk is full"))
        return failed

    answer = answer_to(request(stream=True))
    answer.on_end = fail
    events = decoded(asyncio.run(_joined(answer.events(given(deltas(answer.choices[0], "I look"))))))
    assert decoded(b"".join(kept[0]))[-1]["type"] == "response.completed"  # what would have been told
    last = EVENTS.validate_python(events[-1])
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert "the disk is full" in last.response.error.message
    assert (events[-1]["response"]["store"], events[-1]["sequence_number"]) == (False, len(events) - 1)
    assert last.response.output[0].content[0].text == "I look"
    assert decoded(b"".join(answer.log)) == events
    at_once = answer_to(request())
    at_once.on_end = fail
    with pytest.raises(ApiError, match="the disk is full") as caught:
        asyncio.run(at_once.complete(given(deltas(at_once.choices[0], "I look"))))
    assert (caught.value.status, caught.value.code) == (500, "response_not_stored")


def test_whoever_stops_reading_cancels() -> None:
    answer = answer_to(request(stream=True))
    ended = []
    answer.on_end = lambda it, _: ended.append(it)

    async def read_some() -> None:
        events = answer.events(given(deltas(answer.choices[0], ANSWER)))
        while not answer.object()["output"]:
            await anext(events)
        assert answer.object()["status"] == "in_progress"
        assert ended == []
        await events.aclose()

    asyncio.run(read_some())
    assert ended == [answer]
    assert answer.object()["status"] == "cancelled"
    assert decoded(b"".join(answer.log))[-1]["response"]["status"] == "cancelled"


def test_one_in_the_background_is_queued_first() -> None:
    events = streamed("yes", background=True)
    assert kinds(events)[:4] == ["created", "queued", "in_progress", "output_item.added"]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
    assert events[-1]["response"]["background"] is True


def test_logprobs_are_those_of_the_text() -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    events = streamed(ANSWER, **fields)
    message = events[-1]["response"]["output"][1]["content"][0]
    assert "".join(entry["token"] for entry in message["logprobs"]).strip() == "I look."
    assert message["logprobs"][0]["top_logprobs"][0]["logprob"] == -0.5
    said = [entry for event in events if event["type"].endswith("text.delta") for entry in event.get("logprobs", [])]
    assert [entry["token"] for entry in said] == [entry["token"] for entry in message["logprobs"]]


def test_sealed_reasoning_comes_back() -> None:
    [thought, *_] = whole(ANSWER, include=["reasoning.encrypted_content"])["output"]
    back = [
        {"type": "reasoning", "id": thought["id"], "summary": [], "encrypted_content": thought["encrypted_content"]}
    ]
    later = [{"role": "assistant", "content": "I look."}, {"role": "user", "content": "so?"}]
    body = request(input=[*back, *later])
    assistant, user = messages_of(plain_items(body.input, RESPONSE_ID), None)
    assert assistant == {"role": "assistant", "content": "I look.", "reasoning_content": "hm, two calls"}
    assert user == {"role": "user", "content": "so?"}
    foreign = seal("x").removeprefix("octavo:")
    other = request(input=[{"type": "reasoning", "summary": [], "encrypted_content": foreign}, *later])
    assert "reasoning_content" not in messages_of(plain_items(other.input, RESPONSE_ID), None)[0]


def test_a_turn_with_text_and_calls_is_one_message() -> None:
    output = whole(ANSWER)["output"]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": [{"type": "input_text", "text": "9"}]}
        for item in output[2:]
    ]
    developer = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}
    body = request(input=[developer, {"role": "user", "content": "Hi"}, *output, *results], instructions="You help.")
    system, user, assistant, *tools = messages_of(plain_items(body.input, RESPONSE_ID), body.instructions)
    assert system == {"role": "system", "content": "You help.\n\nBe brief."}
    assert user == {"role": "user", "content": "Hi"}
    assert (assistant["content"], assistant["reasoning_content"]) == ("I look.", "hm, two calls")
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["weather__get", "get_time"]
    assert [(tool["role"], tool["content"], tool["tool_call_id"]) for tool in tools] == [
        ("tool", "9", item["call_id"]) for item in output[2:]
    ]
    text = served().renderer.template.render([system, user, assistant, *tools])
    assert '{"name": "weather__get", "arguments": ' in text


def test_calls_one_after_another_are_turns_of_their_own() -> None:
    call = {"type": "function_call", "name": "get_time", "arguments": "{}"}
    output = {"type": "function_call_output", "output": "9"}
    items = [part | {"call_id": name} for name in ("a", "b") for part in (call, output)]
    roles = [message["role"] for message in messages_of(plain_items(request(input=items).input, RESPONSE_ID), None)]
    assert roles == ["assistant", "tool", "assistant", "tool"]
    with pytest.raises(ApiError, match="'b'"):
        messages_of([*items[:2], items[3]], None)


CUSTOM = {"type": "custom", "name": "apply", "description": "d"}


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_a_custom_tool_takes_free_text(step: int) -> None:
    text = '<tool_call>\n{"name": "apply", "arguments": {"input": "*** \\"a\\"\\n\\u00fc"}}\n</tool_call>'
    events = streamed(text, step=step, tools=[CUSTOM])
    for event in events:
        EVENTS.validate_python(event)
    call = ["custom_tool_call_input.delta", "custom_tool_call_input.done"]
    assert kinds(events)[2:-1] == ["output_item.added", *call, "output_item.done"]
    [item] = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply", '*** "a"\nü')
    assert "".join(event["delta"] for event in events if event["type"].endswith("delta")) == item["input"]
    assert item["id"].startswith("ctc_")
    output = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "done"}
    body = request(input=[item, output])
    assistant, tool = messages_of(plain_items(body.input, RESPONSE_ID), None)
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"input": item["input"]}
    assert (tool["content"], tool["name"]) == ("done", "apply")


def test_a_custom_tool_s_regex_is_its_schema_s() -> None:
    grammar = {"type": "grammar", "syntax": "regex", "definition": "a+"}
    space = {"type": "namespace", "name": "n", "description": "d", "tools": [CUSTOM | {"format": grammar}]}
    choice = {"type": "custom", "name": "apply", "namespace": "n"}
    body = request(tools=[CUSTOM | {"format": {"type": "text"}}, space], tool_choice=choice)
    chat = chat_request(body, [{"role": "user", "content": "Hi"}])
    first, second = [tool.function for tool in chat.tools or ()]
    assert first.parameters is not None
    assert second.parameters is not None
    assert (first.name, first.parameters["properties"]) == ("apply", {"input": {"type": "string"}})
    assert (second.name, second.strict) == ("n__apply", True)
    assert second.parameters["properties"] == {"input": {"type": "string", "pattern": "^(?:a+)$"}}
    assert chat.is_named
    assert (body.namespaces, body.custom_names) == ({"n__apply": ("n", "apply")}, {"apply", "n__apply"})
    lark = request(tools=[TOOLS[0], CUSTOM | {"format": grammar | {"syntax": "lark"}}])
    assert chat_request(lark, [{"role": "user", "content": "Hi"}]).customs == {"apply": "a+"}


CODEX: Json = {
    "model": "tiny",
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "edit"}]},
    ],
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "client_metadata": {"x-codex-installation-id": "1"},
    "text": {"verbosity": "low"},
    "reasoning": {"summary": "auto"},
}


def test_what_codex_sends_is_taken_and_its_hints_are_told() -> None:
    body = ResponsesRequest.model_validate(CODEX)
    found = {*hints_in(body), *body.own_hints}
    assert found == {
        "prompt_cache_key",
        "client_metadata",
        "text.verbosity",
        "reasoning.summary",
        "tools.web_search",
    }
    chat = chat_request(body, messages_of(plain_items(body.input, RESPONSE_ID), body.instructions))
    assert [tool.function.name for tool in chat.tools or ()] == ["get_time", "weather__get"]
    assert (chat.parallel_tool_calls, chat.messages[0].content) == (False, "You are a coding agent.\n\n<permissions>")


def test_fields_keep_their_meaning_in_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    fields = {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}, "tools": None}
    body = request(**fields, max_output_tokens=7, temperature=0.5, top_k=3, seed=4, metadata={"a": "b"}, top_logprobs=2)
    chat = chat_request(body, [{"role": "user", "content": "Hi"}])
    assert chat.response_format is not None
    assert chat.response_format.json_schema is not None
    assert chat.response_format.json_schema.schema_ == schema
    assert (chat.max_completion_tokens, chat.temperature, chat.top_k, chat.seed) == (7, 0.5, 3, 4)
    assert (chat.logprobs, chat.top_logprobs, chat.tools) == (True, 2, None)
    assert hints_in(body) == []


def test_how_hard_the_model_thinks_is_told_to_it_and_counted() -> None:
    body = request(reasoning={"effort": "low"}, thinking_token_budget=5, tools=None)
    chat = chat_request(body, [{"role": "user", "content": "Hi"}])
    assert (chat.reasoning_effort, chat.thinking_token_budget) == ("low", 5)
    details = whole(ANSWER)["usage"]["output_tokens_details"]
    assert 0 < details["reasoning_tokens"] < len(TOKENIZER.encode(ANSWER))
    assert whole("only text")["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tool_choice": "required"}, "web_search"),
        ({"tool_choice": {"type": "web_search_preview"}}, "nobody"),
        ({"tool_choice": {"type": "nothing"}}, "'nothing'"),
        ({"tools": [{"type": "teleport"}]}, "teleport"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]}, "mcp"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "web_search_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]}, "image_url"),
        ({"input": [{"role": "critic", "content": "x"}]}, "critic"),
        ({"input": 5}, "valid string"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "schema"),
        ({"background": True, "store": False}, "background"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "usage"),
        ({"include": ["everything"]}, "include"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"truncation": "middle"}, "truncation"),
    ],
)
def test_what_is_refused(fields: Json, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        request(**fields)


def test_errors_of_the_chat_request_have_this_dialect_s_names() -> None:
    twice = [TOOLS[0], TOOLS[0]]
    with pytest.raises(ApiError, match="twice") as caught:
        chat_request(request(tools=twice), [{"role": "user", "content": "Hi"}])
    assert (caught.value.status, caught.value.param) == (400, "tools")
