"""/v1/responses over a real socket, through the official client: answers, what is kept of them, and the background."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from calling_template import TEMPLATE
from octavo_server import Server, num_in_flight, serving, value, wait_until
from pydantic import BaseModel
from tiny_oracle import Oracle

CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a naïve café?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
LONG: dict[str, Any] = GREEDY | {"input": "Go on.", "max_output_tokens": 480}
CONTEXT = 512
ABORTED = "vllm:request_success_total"
PATH = "/v1/responses"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    """A server of two keys, which writes JSON without spaces between its tokens."""
    dense = json.dumps({"disable_any_whitespace": True})
    flags = ("--served-model-name", "tiny", "--api-key", "mine", "yours", "--structured-outputs-config", dense)
    with serving(*flags) as running:
        yield running


def client_of(server: Server, key: str = "mine") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def mine(keyed: Server) -> Iterator[openai.OpenAI]:
    with client_of(keyed) as client:
        yield client


@pytest.fixture
def http(keyed: Server) -> Iterator[httpx.Client]:
    with keyed.client(headers={"authorization": "Bearer mine"}) as client:
        yield client


def output_of(response: Any) -> list[dict[str, Any]]:
    """What was said, without the ids, and without what the client makes of it."""
    items = [{name: value for name, value in item.to_dict().items() if name != "id"} for item in response.output]
    for item in items:
        for part in item["content"]:
            part.pop("parsed", None)
    return items


def test_the_official_client_gets_transformers_text(mine: openai.OpenAI, oracle: Oracle) -> None:
    expected = oracle.text(oracle.greedy(oracle.chat_ids(CHAT), 40))
    instructions, question = CHAT[0]["content"], CHAT[1]["content"]
    for given in ({"input": CHAT}, {"instructions": instructions, "input": question}):
        answer = mine.responses.create(max_output_tokens=40, **given, **GREEDY)
        assert answer.output_text == expected
        assert (answer.status, answer.model, answer.id[:5]) == ("incomplete", "tiny", "resp_")
        assert answer.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(oracle.chat_ids(CHAT)), 40)
        assert answer.usage.input_tokens_details.cached_tokens <= answer.usage.input_tokens
    count = mine.responses.input_tokens.count(model="tiny", input=CHAT)
    assert count.input_tokens == len(oracle.chat_ids(CHAT))


def test_a_stream_adds_up_to_the_whole_answer(mine: openai.OpenAI) -> None:
    choice = {"structured_outputs": {"choice": ["yes, of course", "no"]}}
    fields = GREEDY | {"extra_body": choice}
    whole = mine.responses.create(input=CHAT, top_logprobs=2, **fields)
    with mine.responses.stream(input=CHAT, top_logprobs=2, **fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (final.status, final.output_text) == (whole.status, whole.output_text) == ("completed", final.output_text)
    assert final.output_text in choice["structured_outputs"]["choice"]
    assert output_of(final) == output_of(whole)
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens
    logprobs = final.output[0].content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == final.output_text
    assert {len(entry.top_logprobs) for entry in logprobs} == {2}


def test_a_model_of_pydantic_s_is_parsed(mine: openai.OpenAI) -> None:
    class Weather(BaseModel):
        city: Literal["Rome", "Zürich"]
        is_warm: bool

    parsed = mine.responses.parse(model="tiny", input="How is it?", text_format=Weather, temperature=0)
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.city in ("Rome", "Zürich")
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"


def test_a_conversation_goes_on_from_what_is_kept(mine: openai.OpenAI) -> None:
    first = mine.responses.create(input=CHAT, max_output_tokens=8, **GREEDY)
    second = mine.responses.create(input="Why?", previous_response_id=first.id, max_output_tokens=8, **GREEDY)
    again = [*CHAT, *(item.to_dict() for item in first.output), {"role": "user", "content": "Why?"}]
    whole = mine.responses.create(input=again, max_output_tokens=8, store=False, **GREEDY)
    assert (second.output_text, second.previous_response_id) == (whole.output_text, first.id)
    assert second.usage is not None
    assert whole.usage is not None
    assert second.usage.input_tokens == whole.usage.input_tokens
    referred = [{"type": "item_reference", "id": first.output[0].id}]
    third = mine.responses.create(input=[*CHAT, *referred, again[-1]], max_output_tokens=8, **GREEDY)
    assert third.output_text == whole.output_text
    with pytest.raises(openai.NotFoundError):
        mine.responses.retrieve(whole.id)


def test_a_response_is_kept_for_its_key_until_it_is_deleted(keyed: Server, mine: openai.OpenAI) -> None:
    made = mine.responses.create(input=CHAT, max_output_tokens=8, metadata={"a": "b"}, **GREEDY)
    assert mine.responses.retrieve(made.id) == made
    items = mine.responses.input_items.list(made.id, order="asc", limit=1)
    assert [item.content[0].text for item in items] == ["Be brief.", "What is a naïve café?"]  # over two pages
    with client_of(keyed, "yours") as yours:
        for ask in (yours.responses.retrieve, yours.responses.delete, yours.responses.cancel):
            with pytest.raises(openai.NotFoundError, match=made.id):
                ask(made.id)
        with pytest.raises(openai.NotFoundError, match="previous_response_id"):
            yours.responses.create(input="Why?", previous_response_id=made.id, **GREEDY)
        with pytest.raises(openai.NotFoundError, match=made.output[0].id):
            yours.responses.create(input=[{"type": "item_reference", "id": made.output[0].id}], **GREEDY)
    with pytest.raises(openai.BadRequestError, match="background: true"):
        mine.responses.cancel(made.id)
    mine.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        mine.responses.retrieve(made.id)


def test_events_can_be_read_again(mine: openai.OpenAI, http: httpx.Client) -> None:
    body = {"model": "tiny", "input": "Hi", "temperature": 0, "max_output_tokens": 12, "ignore_eos": True}
    sent = http.post(PATH, json=body | {"stream": True}).content
    last = json.loads(sent.split(b"\n\n")[-2].split(b"\ndata: ")[1])
    name = last["response"]["id"]
    assert http.get(f"{PATH}/{name}", params={"stream": True}).content == sent
    rest = http.get(f"{PATH}/{name}", params={"stream": True, "starting_after": 5}).content
    assert sent.endswith(rest)
    assert [event.sequence_number for event in mine.responses.retrieve(name, stream=True, starting_after=5)] == list(
        range(6, last["sequence_number"] + 1)
    )
    assert http.get(f"{PATH}/{name}").json() == last["response"]


def test_a_limit_above_the_room_is_what_the_room_is(mine: openai.OpenAI) -> None:
    answer = mine.responses.create(input=CHAT, max_output_tokens=32_000, **GREEDY)
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.status) == (CONTEXT, "incomplete")


def test_truncation_drops_the_oldest_turns(mine: openai.OpenAI, oracle: Oracle) -> None:
    turns = [{"role": role, "content": f"{number} " + "word " * 10} for number in range(20) for role in ROLES]
    long = [CHAT[0], *turns, CHAT[1]]
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        mine.responses.create(input=long, **GREEDY)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    answer = mine.responses.create(input=long, truncation="auto", max_output_tokens=16, **GREEDY)
    fits = [
        kept
        for start in range(0, len(turns) + 1, 2)
        if len(oracle.chat_ids(kept := [CHAT[0], *turns[start:], CHAT[1]])) <= CONTEXT - 16
    ]
    assert answer.output_text == oracle.text(oracle.greedy(oracle.chat_ids(fits[0]), 16))


ROLES = ("user", "assistant")


def idle(http: httpx.Client) -> None:
    wait_until(lambda: num_in_flight(http) == 0)


def test_the_background_goes_on_without_a_reader(mine: openai.OpenAI, http: httpx.Client) -> None:
    expected = mine.responses.create(**LONG)
    queued = mine.responses.create(background=True, **LONG)
    assert (queued.status, queued.output) == ("queued", [])
    with mine.responses.create(background=True, stream=True, **LONG) as events:
        first = next(iter(events))  # and hang up
    assert first.type == "response.created"
    for name in (queued.id, first.response.id):
        wait_until(lambda: mine.responses.retrieve(name).status not in ("queued", "in_progress"))  # noqa: B023
        ended = mine.responses.retrieve(name)
        assert (ended.status, ended.output_text) == ("incomplete", expected.output_text)
        types = [event.type for event in mine.responses.retrieve(name, stream=True)]
        assert types[:3] == ["response.created", "response.queued", "response.in_progress"]
    idle(http)


def test_one_in_the_background_is_followed_as_it_runs(mine: openai.OpenAI) -> None:
    queued = mine.responses.create(background=True, **LONG)
    followed = list(mine.responses.retrieve(queued.id, stream=True, starting_after=1))
    assert [event.sequence_number for event in followed] == list(range(2, 2 + len(followed)))
    assert followed[-1].type == "response.incomplete"
    assert "".join(event.delta for event in followed if event.type == "response.output_text.delta") == (
        mine.responses.retrieve(queued.id).output_text
    )


def test_cancelling_ends_the_engine_s_work(mine: openai.OpenAI, http: httpx.Client) -> None:
    idle(http)
    aborted = value(http, ABORTED, finished_reason="abort")
    names = [mine.responses.create(background=True, **LONG).id for _ in range(20)]
    wait_until(lambda: num_in_flight(http) == 20)
    with pytest.raises(openai.BadRequestError, match="still being made"):
        mine.responses.create(previous_response_id=names[-1], **LONG)
    assert mine.responses.cancel(names[-1]).status == "cancelled"
    assert mine.responses.cancel(names[-1]).status == mine.responses.retrieve(names[-1]).status == "cancelled"
    events = list(mine.responses.retrieve(names[-1], stream=True))
    assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "cancelled")
    for name in names[:-1]:
        mine.responses.delete(name)
    idle(http)
    assert value(http, ABORTED, finished_reason="abort") == aborted + 20
    with pytest.raises(openai.NotFoundError):
        mine.responses.retrieve(names[0])
    ended = mine.responses.create(background=True, max_output_tokens=1, input="Hi", **GREEDY)
    wait_until(lambda: mine.responses.retrieve(ended.id).status == "incomplete")
    with pytest.raises(openai.BadRequestError, match="ended already, as incomplete"):
        mine.responses.cancel(ended.id)


def test_a_client_that_hangs_up_ends_a_response_in_the_foreground(mine: openai.OpenAI, http: httpx.Client) -> None:
    idle(http)
    names = []
    for _ in range(10):
        with mine.responses.create(stream=True, **LONG) as events:
            names.append(next(iter(events)).response.id)
    idle(http)
    wait_until(lambda: [mine.responses.retrieve(name).status for name in names] == ["cancelled"] * 10)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"previous_response_id": "resp_x"}, 404, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, 404, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, 400, "input"),
        ({"model": "nobody"}, 404, "model"),
        ({"tools": [{"type": "function", "name": "f"}]}, 400, "tools"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 5}}}}, 400, None),
        ({"temprature": 1}, 400, "temprature"),
    ],
)
def test_what_is_refused_is_named(http: httpx.Client, fields: dict[str, Any], status: int, param: str | None) -> None:
    response = http.post(PATH, json={"input": "Hi"} | fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    if param is not None:
        assert error["param"] == param
    assert "response_format" not in error["message"]


def test_queries_are_checked(mine: openai.OpenAI, http: httpx.Client) -> None:
    name = mine.responses.create(input="Hi", max_output_tokens=1, model="tiny").id
    for query, param in (
        ("/input_items?limit=0", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_x", "after"),
        ("?stream=perhaps", "stream"),
        ("?stream=true&starting_after=x", "starting_after"),
    ):
        response = http.get(f"{PATH}/{name}{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert http.get(f"{PATH}/{name}?stream=true&starting_after=1000").content == b""


def test_hints_are_counted(http: httpx.Client) -> None:
    body = {"input": "Hi", "max_output_tokens": 1, "tools": [{"type": "web_search"}], "client_metadata": {"a": "b"}}
    assert http.post(PATH, json=body | {"tool_choice": "auto", "text": {"verbosity": "low"}}).status_code == 200
    for field in ("tools.web_search", "client_metadata", "text.verbosity"):
        assert value(http, "octavo:ignored_hint_total", field=field) >= 1


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "web_search"},
    {"type": "function", "name": "get_time", "parameters": {"type": "object", "properties": {}}, "strict": True},
    {
        "type": "namespace",
        "name": "weather",
        "description": "d",
        "tools": [
            {"type": "function", "name": "get", "parameters": CITY | {"additionalProperties": False}, "strict": True}
        ],
    },
    {"type": "custom", "name": "roll", "format": {"type": "grammar", "syntax": "regex", "definition": "[1-6]d[68]"}},
]


@pytest.fixture(scope="module")
def tooled() -> Iterator[openai.OpenAI]:
    """A server whose model is shown tools; it is as small as the other, so it calls what it must."""
    dense = json.dumps({"disable_any_whitespace": True})
    flags = ("--chat-template", TEMPLATE, "--structured-outputs-config", dense)
    with serving("--served-model-name", "tiny", *flags) as server, client_of(server) as client:
        yield client


def test_a_call_its_output_and_the_next_turn(tooled: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "name": "get", "namespace": "weather"}
    asked: dict[str, Any] = {"model": "tiny", "input": "Weather?", "tools": TOOLS, "tool_choice": choice}
    asked["extra_body"] = {"seed": 7}  # a greedy answer of this model is white space
    made = tooled.responses.create(max_output_tokens=200, **asked)
    [call] = made.output
    assert (call.type, call.name, call.namespace, made.status) == ("function_call", "get", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Bern")
    with tooled.responses.stream(max_output_tokens=200, **asked) as stream:
        [streamed] = stream.get_final_response().output
    assert (streamed.arguments, streamed.name) == (call.arguments, call.name)
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    rest: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 8, "tools": TOOLS}
    kept = tooled.responses.create(input=[output], previous_response_id=made.id, **rest)
    user = {"role": "user", "content": "Weather?"}
    whole = tooled.responses.create(input=[user, call.to_dict(), output], store=False, **rest)
    assert kept.usage is not None
    assert whole.usage is not None
    assert (kept.output_text, kept.usage.input_tokens) == (whole.output_text, whole.usage.input_tokens)
    assert kept.usage.input_tokens > made.usage.input_tokens  # type: ignore[union-attr]
    with pytest.raises(openai.BadRequestError, match="no call before it"):
        tooled.responses.create(input=[output], **rest)
    with pytest.raises(openai.BadRequestError, match="web_search"):
        tooled.responses.create(**asked | {"tool_choice": "required"})


def test_a_custom_tool_s_input_is_of_its_regex(tooled: openai.OpenAI) -> None:
    choice: Any = {"type": "custom", "name": "roll"}
    asked: dict[str, Any] = {"model": "tiny", "input": "Roll.", "tools": TOOLS[3:], "tool_choice": choice}
    events = list(tooled.responses.create(stream=True, max_output_tokens=100, extra_body={"seed": 1}, **asked))
    [call] = events[-1].response.output  # type: ignore[union-attr]
    assert call.type == "custom_tool_call"
    assert re.fullmatch("[1-6]d[68]", call.input)
    said = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    assert "".join(said) == call.input


def test_a_file_keeps_responses_over_a_restart(tmp_path: Path) -> None:
    flags = ("--served-model-name", "tiny", "--response-store", str(tmp_path / "responses.db"))
    with serving(*flags) as server, client_of(server) as client:
        made = client.responses.create(input=CHAT, max_output_tokens=8, **GREEDY)
        running = client.responses.create(background=True, **LONG)
        server.send_signal(signal.SIGKILL)
        server.exit_code()
    with serving(*flags) as server, client_of(server) as client:
        assert client.responses.retrieve(made.id) == made
        failed = client.responses.retrieve(running.id)
        assert (failed.status, failed.error is not None) == ("failed", True)
        more = client.responses.create(input="Why?", previous_response_id=made.id, max_output_tokens=8, **GREEDY)
        assert more.status == "incomplete"


def test_a_server_without_a_store_says_so() -> None:
    with serving("--served-model-name", "tiny", "--response-store", "off") as server, client_of(server) as client:
        made = client.responses.create(input=CHAT, max_output_tokens=8, **GREEDY)
        assert made.to_dict()["store"] is False
        for fields in ({"store": True}, {"background": True}, {"previous_response_id": made.id}):
            with pytest.raises(openai.BadRequestError, match="--response-store"):
                client.responses.create(input="Hi", model="tiny", **fields)
        with pytest.raises(openai.NotFoundError, match="--response-store"):
            client.responses.retrieve(made.id)
