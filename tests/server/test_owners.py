"""A request belongs to the API key that made it: another key's abort does not reach it. The engine stands meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from octavo_server import PATIENCE, Server, serving, wait_until

NATIVE = {"text": "The", "rid": "mine", "sampling_params": {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}}
COMPLETION = {"prompt": "The", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
BEAMS = COMPLETION | {"use_beam_search": True, "n": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--api-key", "a", "b", "--engine-timeout", "300") as running:
        yield running


@contextmanager
def standing(server: Server) -> Iterator[None]:
    """The engine begins nothing, and goes on afterwards."""
    os.kill(server.engine_pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.engine_pid, signal.SIGCONT)


class Keys:
    """Both keys' clients, and requests of theirs that wait for an answer."""

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self._clients = {
            key: stack.enter_context(server.client(headers={"Authorization": f"Bearer {key}"})) for key in "ab"
        }
        self._pool = stack.enter_context(ThreadPoolExecutor(8))

    def post(self, key: str, path: str, body: dict[str, Any]) -> httpx.Response:
        return self._clients[key].post(path, json=body)

    def begin(self, key: str, path: str, body: dict[str, Any]) -> Future[httpx.Response]:
        return self._pool.submit(self.post, key, path, body)

    @property
    def num_open(self) -> int:
        return int(self._clients["a"].get("/load").json()["server_load"])


@pytest.fixture
def keys(server: Server) -> Iterator[Keys]:
    with ExitStack() as stack:
        yield Keys(server, stack)


def native_reason(answer: Future[httpx.Response]) -> str:
    return str(answer.result(PATIENCE).json()["meta_info"]["finish_reason"]["type"])


def reasons(answer: Future[httpx.Response]) -> list[str]:
    response = answer.result(PATIENCE)
    assert response.status_code == 200, response.text
    return [choice["finish_reason"] for choice in response.json()["choices"]]


def test_an_abort_by_rid_ends_what_has_the_same_key(server: Server, keys: Keys) -> None:
    """Both keys have called a request the same."""
    with standing(server):
        of_a = keys.begin("a", "/generate", NATIVE)
        wait_until(lambda: keys.num_open == 1)
        assert keys.post("b", "/abort_request", {"rid": "mi"}).status_code == 200
        of_b = [keys.begin("b", "/generate", NATIVE) for _ in range(2)]
        wait_until(lambda: keys.num_open == 3)
        assert keys.post("b", "/abort_request", {"rid": "mi"}).status_code == 200
        assert [native_reason(each) for each in of_b] == ["abort", "abort"]
        assert keys.num_open == 1
    assert native_reason(of_a) == "length"


def test_abort_all_ends_all_that_has_the_same_key(server: Server, keys: Keys) -> None:
    with standing(server):
        of_a = keys.begin("a", "/v1/completions", COMPLETION | {"n": 2})
        of_b = keys.begin("b", "/v1/completions", COMPLETION | {"n": 2})
        native = keys.begin("b", "/generate", NATIVE)
        wait_until(lambda: keys.num_open == 5)
        assert keys.post("b", "/abort_request", {"abort_all": True}).status_code == 200
        assert reasons(of_b) == ["abort", "abort"]
        assert native_reason(native) == "abort"
        assert keys.num_open == 2
    assert reasons(of_a) == ["length", "length"]


def test_requests_are_aborted_by_their_names(server: Server, keys: Keys) -> None:
    """By a request's name or its answer's id: those of the same key, with all of their answers."""
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "ignore_eos": True}
    with standing(server):
        of_a = keys.begin("a", "/v1/completions", COMPLETION | {"request_id": "mine"})
        named = [
            keys.begin("b", "/v1/completions", COMPLETION | {"request_id": "mine", "n": 2}),
            keys.begin("b", "/v1/chat/completions", chat | {"request_id": "talk"}),
        ]
        beams = keys.begin("b", "/v1/completions", BEAMS | {"request_id": "search"})
        other = keys.begin("b", "/v1/completions", COMPLETION | {"request_id": "other"})
        wait_until(lambda: keys.num_open == 6)
        for missing in (["none"], ["min", "cmpl-min"], ["talk-"]):
            assert keys.post("b", "/abort_requests", {"request_ids": missing}).status_code == 200
        assert keys.num_open == 6
        known = {"request_ids": ["mine", "chatcmpl-talk", "cmpl-search"]}
        assert keys.post("b", "/abort_requests", known).status_code == 200
        assert [reasons(each) for each in (*named, beams)] == [["abort", "abort"], ["abort"], ["abort"] * 3]
        assert keys.num_open == 2
    assert reasons(of_a) == reasons(other) == ["length"]
    assert keys.post("b", "/abort_requests", {}).status_code == 400


def test_a_beam_search_that_is_aborted_answers_with_its_beams_so_far(server: Server, keys: Keys) -> None:
    with standing(server):
        of_a = keys.begin("a", "/v1/completions", BEAMS)
        of_b = keys.begin("b", "/v1/completions", BEAMS)
        wait_until(lambda: keys.num_open == 2)
        assert keys.post("b", "/abort_request", {"abort_all": True}).status_code == 200
        assert reasons(of_b) == ["abort"] * 3
    assert reasons(of_a) == ["length"] * 3
