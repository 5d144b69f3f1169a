"""What a model says, as Ollama's API sends it: the official client reads it from a real socket.

The model's tokens are given; no engine runs.
"""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest
from given_answers import ANSWER, FOUND, SILENT, choices_of, folded, pieces_of, served, steps_of
from pydantic import TypeAdapter
from scripted_server import STREAM_END, chunk, serving, whole

from octavo.server.bodies import validated
from octavo.server.dialects import ollama as dialect
from octavo.server.dialects.ollama_request import ChatRequest, GenerateRequest, chat_of
from octavo.server.dialects.system_turns import SystemTurns
from octavo.server.errors import ApiError
from octavo.server.message.infer import Inference

BOTH = SystemTurns(at_head=True, inline=True)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": SCHEMA}}
    for name in ("get_weather", "get_time")
]
MESSAGES = [{"role": "user", "content": "Hi"}]
KIND: TypeAdapter[ChatRequest] = TypeAdapter(ChatRequest)
GENERATE: TypeAdapter[GenerateRequest] = TypeAdapter(GenerateRequest)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"


def request(**fields: Any) -> ChatRequest:
    body = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS} | fields
    return validated(json.dumps(body).encode(), KIND)


def generate(**fields: Any) -> GenerateRequest:
    return validated(json.dumps({"model": "tiny", "prompt": "Hi"} | fields).encode(), GENERATE)


def answer_to(body: ChatRequest, found: Inference) -> dialect.ChatAnswer:
    model = served(found)
    return dialect.ChatAnswer(body, choices_of(chat_of(body, BOTH, model), model), model)


def told(
    text: str, finish: str = "stop", size: int = 1, found: Inference = FOUND, **fields: Any
) -> tuple[ollama.ChatResponse, list[ollama.ChatResponse]]:
    """The whole answer and the stream's pieces, as the client has them."""
    body = request(**fields)
    at_once = answer_to(body, found)
    answer = at_once.whole(folded(steps_of(at_once.choices, text, finish, size)))
    in_steps = answer_to(body, found)
    pieces = pieces_of(in_steps, steps_of(in_steps.choices, text, finish, size))
    streamed = [HEAD, *map(chunk, pieces), STREAM_END]
    with (
        serving(lambda asked: streamed if asked.json["stream"] else whole(answer)) as server,
        ollama.Client(host=server.url) as client,
    ):
        message = client.chat("tiny", messages=MESSAGES)
        return message, list(client.chat("tiny", messages=MESSAGES, stream=True))


def said(*answers: ollama.ChatResponse) -> dict[str, Any]:
    """All that is said in these answers."""
    calls = [call.function for answer in answers for call in answer.message.tool_calls or ()]
    return {
        "content": "".join(answer.message.content or "" for answer in answers),
        "thinking": "".join(answer.message.thinking or "" for answer in answers),
        "calls": [(call.name, call.arguments) for call in calls],
    }


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_adds_up_to_the_whole_answer(size: int) -> None:
    message, pieces = told(ANSWER + "\nAnd then?", size=size)
    assert said(message) == said(*pieces)
    assert said(message) == {
        "content": "I look.\nAnd then?",
        "thinking": "hm, two calls",
        "calls": [("get_weather", {"city": "Zürich", "days": [1, 2]}), ("get_time", {})],
    }
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (message.done_reason, pieces[-1].done_reason) == ("stop", "stop")
    assert message.eval_count == pieces[-1].eval_count
    assert message.prompt_eval_count == pieces[-1].prompt_eval_count


def test_an_engine_that_dies_in_mid_stream_is_an_error() -> None:
    answer = answer_to(request(), FOUND)
    pieces = pieces_of(answer, steps_of(answer.choices, ANSWER, "stop", 1))[:5]
    broken = [*pieces, answer.framing.error(ApiError(503, "the engine is dead")), answer.framing.end]
    streamed = [HEAD, *(chunk(piece) for piece in broken if piece), STREAM_END]
    with (
        serving(lambda _: streamed) as server,
        ollama.Client(host=server.url) as client,
        pytest.raises(ollama.ResponseError, match="the engine is dead"),
    ):
        list(client.chat("tiny", messages=MESSAGES, stream=True))


def test_nothing_said_is_an_empty_message() -> None:
    message, pieces = told("", found=SILENT)
    assert said(message) == said(*pieces) == {"content": "", "thinking": "", "calls": []}
    assert len(pieces) == 1


def test_a_call_that_is_cut_is_no_call() -> None:
    message, pieces = told(ANSWER[: ANSWER.index("rich")], "length")
    cut = 'I look.{"name": "get_weather", "arguments": {"city":  "Zü'
    assert said(message) == said(*pieces) == {"content": cut, "thinking": "hm, two calls", "calls": []}
    assert (message.done_reason, pieces[-1].done_reason) == ("length", "length")


def turns(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    chat = chat_of(request(messages=list(messages)), BOTH, served())
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


def test_results_belong_to_calls() -> None:
    calls = [call("get_weather", city="Bern"), call("get_time"), call("get_weather", city="Basel")]
    asked = {"role": "assistant", "content": "", "thinking": "I need a tool", "tool_calls": calls}
    results = [
        {"role": "tool", "content": "noon", "tool_name": "get_time"},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "snow", "tool_name": "get_weather"},
        {"role": "tool", "content": "more"},
    ]
    found = turns(*MESSAGES, asked, *results)
    assert found[1]["reasoning_content"] == "I need a tool"
    ids = [each["id"] for each in found[1]["tool_calls"]]
    assert len(set(ids)) == 3
    arguments = [each["function"]["arguments"] for each in found[1]["tool_calls"]]
    assert arguments == ['{"city":"Bern"}', "{}", '{"city":"Basel"}']
    assert [(turn.get("tool_call_id"), turn.get("name")) for turn in found[2:]] == [
        (ids[1], "get_time"),
        (ids[0], "get_weather"),
        (ids[2], "get_weather"),
        (None, None),
    ]
    own = turns(*MESSAGES, asked | {"tool_calls": [calls[0] | {"id": "x"}]}, results[1] | {"tool_call_id": "x"})
    assert own[1]["tool_calls"][0]["id"] == own[2]["tool_call_id"] == "x"


def test_options_are_the_samplers() -> None:
    options = {
        "num_predict": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 4,
        "stop": ["x"],
        "num_ctx": 4096,
    }
    body = request(options=options)
    chat = chat_of(body, BOTH, served())
    model = served()
    answer = dialect.ChatAnswer(body, choices_of(chat, model), model)
    params = answer.choices[0].request.params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (7, 0.5, 3, 0.9)
    assert (params.min_p, params.repetition_penalty, params.presence_penalty) == (0.1, 1.1, 0.2)
    assert (params.frequency_penalty, params.seed, chat.stops) == (0.3, 4, ["x"])
    assert answer.hints == ["options.num_ctx"]


@pytest.mark.parametrize("num_predict", [None, -1, -2, 0, 1_000_000])
def test_without_a_limit_the_context_is_the_limit(num_predict: int | None) -> None:
    [choice] = answer_to(request(options={"num_predict": num_predict}), FOUND).choices
    assert choice.request.params.max_tokens == 4096 - len(choice.request.token_ids)


def test_thinking_is_switched_by_the_template() -> None:
    def variables(think: Any) -> Any:
        return chat_of(request(think=think), BOTH, served()).chat_template_kwargs

    assert (variables(True), variables("high")) == ({"enable_thinking": True}, {"enable_thinking": True})
    assert (variables(False), variables(None)) == ({"enable_thinking": False}, None)
    assert chat_of(request(think=False), BOTH, served(SILENT)).chat_template_kwargs is None


def test_a_prompt_with_its_system_message() -> None:
    chat = chat_of(generate(system="Be brief.", format="json"), BOTH, served())
    assert [(message.role, message.content) for message in chat.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert chat.response_format is not None
    assert chat.response_format.type == "json_object"
    schema = chat_of(generate(format=SCHEMA), BOTH, served()).response_format
    assert schema is not None
    assert schema.json_schema is not None
    assert schema.json_schema.schema_ == SCHEMA


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 1}, "temprature: octavo does not support this field"),
        ({"options": {"mirostat": 2}}, "options.mirostat: octavo does not support the value 2"),
        ({"options": {"temprature": 2}}, "options.temprature: octavo does not support this field"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "options: repeat_last_n: penalties count all"),
        ({"messages": [{"role": "user", "content": "x", "images": [5]}]}, "messages.0.images.0"),
        ({"format": "yaml"}, 'format: must be "json", or a JSON Schema'),
        ({"think": "hard"}, "think: must be true, false, low, medium or high"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools: 'get_weather' stands there twice"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"model": None}, "model: "),
    ],
)
def test_what_is_not_honored_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(request(**fields), BOTH, served())
    assert caught.value.status == 400
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "{{ .Prompt }}"}, "template: octavo does not support the value"),
        ({"context": [1, 2]}, "context: octavo does not support this field"),
        ({"raw": True, "system": "x"}, "raw: the prompt goes to the model as it is"),
    ],
)
def test_what_generate_does_not_honor_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        generate(**fields)
    assert caught.value.message.startswith(message)


def test_a_model_that_can_not_think_says_so() -> None:
    with pytest.raises(ApiError, match="think: 'tiny' does not support thinking"):
        chat_of(request(think=True), BOTH, served(SILENT))


def test_an_answer_that_was_ended_from_outside_is_an_error() -> None:
    at_once = answer_to(request(), FOUND)
    with pytest.raises(ApiError, match="ended before it was complete") as caught:
        at_once.whole(folded(steps_of(at_once.choices, ANSWER, "abort", 3)))
    assert caught.value.status == 503
    in_steps = answer_to(request(), FOUND)
    pieces = pieces_of(in_steps, steps_of(in_steps.choices, ANSWER, "abort", 3))
    with (
        serving(lambda _: [HEAD, *map(chunk, pieces), STREAM_END]) as server,
        ollama.Client(host=server.url) as client,
    ):
        coming = client.chat("tiny", messages=MESSAGES, stream=True)
        answers = [next(coming) for _ in pieces[:-1]]  # an answer each, before the error
        with pytest.raises(ollama.ResponseError, match="ended before it was complete"):
            next(coming)
    assert said(*answers)["content"].strip() == "I look."
    assert not any(answer.done for answer in answers)


@pytest.mark.parametrize("finish", ["length", "repetition"])
def test_an_answer_that_was_cut_says_so(finish: str) -> None:
    message, streamed = told("Again. Again. Again.", finish)
    assert (message.done_reason, streamed[-1].done_reason) == ("length", "length")
