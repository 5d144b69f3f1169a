"""SGLang's sessions over a real socket: each request answers as its tokens would without a session."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from octavo_server import Server, num_in_flight, serving, wait_until
from tiny_oracle import Oracle

from octavo.server.dialects.native_sessions import kept
from octavo.server.generation import Delta, Steps
from octavo.server.sessions import Continuation, SessionLimits, Sessions

GREEDY = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 6}


def opened(client: httpx.Client, **fields: Any) -> str:
    response = client.post("/open_session", json={"capacity_of_str_len": 1000, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def generate(client: httpx.Client, session: str, ids: list[int], rid: str | None = None, **fields: Any) -> Any:
    """One request of a session; fields beside /generate's own are those of session_params."""
    own = {
        name: fields.pop(name) for name in ("sampling_params", "return_logprob", "logprob_start_len") if name in fields
    }
    params = {"id": session, "rid": rid, **fields}
    body = {"input_ids": ids, "sampling_params": GREEDY, "session_params": params, **own}
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: httpx.Client, session: str, **params: Any) -> str:
    body = {"input_ids": [5], "session_params": {"id": session, **params}}
    response = client.post("/generate", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "session_params"
    return response.json()["error"]["message"]


def test_requests_go_on_from_each_other(client: httpx.Client, oracle: Oracle) -> None:
    session = opened(client)
    first, second = oracle.ids("The capital of"), oracle.ids(" and then")
    one = generate(client, session, first)
    assert one["output_ids"] == oracle.greedy(first, 6)
    rid = one["meta_info"]["id"]
    whole = first + one["output_ids"] + second
    two = generate(client, session, second, rid, return_logprob=True, logprob_start_len=len(first))
    assert two["output_ids"] == oracle.greedy(whole, 6)
    about = two["meta_info"]
    assert about["prompt_tokens"] == len(whole)
    assert [entry[1] for entry in about["input_token_logprobs"]] == whole[len(first) :]
    branch = generate(client, session, second, rid, drop_previous_output=True)
    assert branch["output_ids"] == oracle.greedy(first + second, 6)
    short = generate(client, session, second, rid, offset=-1)
    assert short["output_ids"] == oracle.greedy(first + one["output_ids"][:-1] + second, 6)
    again = generate(client, session, second, about["id"], replace=True)
    assert again["output_ids"] == oracle.greedy(whole + two["output_ids"] + second, 6)
    anew = generate(client, session, second, replace=True)
    assert anew["output_ids"] == oracle.greedy(second, 6)
    assert "has no request" in refused(client, session, rid=rid)


def test_text_and_streams_are_kept_as_well(client: httpx.Client, oracle: Oracle) -> None:
    session = opened(client, streaming=True)
    whole: list[int] = []
    for text in ("One ", "two ", "three "):
        body = {"text": text, "sampling_params": GREEDY, "session_params": {"id": session}, "stream": True}
        with client.stream("POST", "/generate", json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.read().endswith(b"data: [DONE]\n\n")
        whole += oracle.ids(text)
        whole += oracle.greedy(whole, 6)
    last = generate(client, session, [9])
    assert last["meta_info"]["prompt_tokens"] == len(whole) + 1
    assert last["output_ids"] == oracle.greedy([*whole, 9], 6)
    assert "session_params.replace" in refused(client, session, replace=True)


LONG = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 480}


def test_a_request_under_way_is_waited_for_or_replaced(client: httpx.Client, oracle: Oracle) -> None:
    session = opened(client)
    name = uuid.uuid4().hex
    body = {"input_ids": [9], "sampling_params": LONG, "session_params": {"id": session}, "rid": name, "stream": True}
    client.post("/pause", params={"mode": "keep"})
    try:
        with client.stream("POST", "/generate", json=body) as response:
            assert "still being answered" in refused(client, session, rid=name)
            client.post("/resume")
            lines = response.iter_lines()
            next(lines)
            after = generate(client, session, [10], name, replace=True)
            last = [line for line in lines if line.startswith("data: {")][-1]
    finally:
        client.post("/resume")
    reason = json.loads(last.removeprefix("data: "))["meta_info"]["finish_reason"]["type"]
    assert reason in ("abort", "length")  # the machine may have been faster than the one that replaces it
    length = after["meta_info"]["prompt_tokens"]
    assert after["output_ids"] == oracle.greedy([9, *oracle.greedy([9], length - 2), 10], 6)


def test_whoever_hangs_up_leaves_a_session_that_goes_on(client: httpx.Client) -> None:
    for streaming in (False, True):
        session = opened(client, streaming=streaming)
        rid = generate(client, session, [7, 8])["meta_info"]["id"]
        params = {"id": session, "rid": rid}
        body = {"input_ids": [9], "sampling_params": LONG, "session_params": params, "stream": True}
        with client.stream("POST", "/generate", json=body) as response:
            next(response.iter_lines())
        wait_until(lambda: num_in_flight(client) == 0)
        assert generate(client, session, [10], rid)["meta_info"]["prompt_tokens"] >= 9


@pytest.mark.parametrize("finish", [None, "abort", "stop"])
@pytest.mark.parametrize("is_streaming", [False, True])
def test_what_of_an_answer_is_kept(is_streaming: bool, finish: str | None) -> None:
    sessions = Sessions(SessionLimits(1, 1000, 100.0))
    sessions.open("me", "s", is_streaming=is_streaming, seconds=None)

    async def answered() -> None:
        turn = sessions.begin("me", Continuation("s"), "a")
        sessions.reserve(turn, [1, 2], 5)

        async def steps() -> Steps:
            yield [Delta(0, [], [3, 4], [], [])]
            yield [Delta(0, [], [5], [], [], finish)]

        async with aclosing(kept(sessions, turn, steps())) as seen:
            async for _ in seen:
                if finish is None:
                    break  # the client hangs up

    asyncio.run(answered())
    following = sessions.begin("me", Continuation("s", None if is_streaming else "a"), "b")
    said = [1, 2, 3, 4] if finish is None else [1, 2, 3, 4, 5]
    assert following.before == ([] if is_streaming and finish != "stop" else said)


def test_what_is_closed_is_gone(client: httpx.Client) -> None:
    session = opened(client, session_id="mine")
    assert session == "mine"
    assert client.post("/open_session", json={"session_id": "mine"}).json()["error"]["param"] == "session_id"
    generate(client, session, [5])
    closed = client.request("GET", "/close_session", json={"session_id": "mine"})
    assert (closed.status_code, closed.content) == (200, b"")
    assert "no session 'mine' is open" in refused(client, "mine")
    assert client.post("/close_session", json={"session_id": "mine"}).status_code == 200  # there is none either way
    for body, name in (({"timeout": 0}, "timeout"), ({"session_id": ""}, "session_id"), ({"extra": 1}, "extra")):
        assert client.post("/open_session", json=body).json()["error"]["param"] == name


def test_what_can_t_begin_is_not_kept(client: httpx.Client) -> None:
    session = opened(client, streaming=True)
    generate(client, session, [5] * 480)
    body = {"input_ids": [5] * 100, "session_params": {"id": session}}
    assert client.post("/generate", json=body).json()["error"]["code"] == "context_length_exceeded"
    assert generate(client, session, [6])["meta_info"]["prompt_tokens"] == 487


@pytest.fixture(scope="module")
def bounded() -> Iterator[Server]:
    flags = ("--api-key", "ka", "kb", "--max-sessions", "2", "--max-session-tokens", "400", "--session-timeout", "50")
    with serving(*flags) as server:
        yield server


def test_a_session_is_its_key_s_and_bounded(bounded: Server) -> None:
    with (
        bounded.client(headers={"authorization": "Bearer ka"}) as mine,
        bounded.client(headers={"authorization": "Bearer kb"}) as yours,
    ):
        session = opened(mine, session_id="same")
        assert "no session 'same' is open" in refused(yours, "same")
        assert opened(yours, session_id="same") == "same"
        full = mine.post("/open_session", json={})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "sessions_full")
        assert "--max-sessions" in full.json()["error"]["message"]
        assert "--session-timeout" in mine.post("/open_session", json={"timeout": 51}).json()["error"]["message"]
        rid = generate(mine, session, [5] * 200)["meta_info"]["id"]
        more = {"input_ids": [5] * 100, "session_params": {"id": session, "rid": rid}}
        refusal = mine.post("/generate", json=more)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "sessions_full")
        assert "--max-session-tokens" in refusal.json()["error"]["message"]
        yours.post("/close_session", json={"session_id": "same"})
        mine.post("/close_session", json={"session_id": "same"})
        opened(mine)
