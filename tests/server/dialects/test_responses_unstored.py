"""A store that can't be written: the kernel refuses each write of the server's to a file, as a full disk would."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from octavo_server import Server, serving, wait_until

Json = dict[str, Any]
NO_FILE = (1, resource.RLIM_INFINITY)  # bytes of a file
ANY_FILE = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("store") / "responses.db"
    with serving("--response-store", str(place), "--served-model-name", "tiny") as server:
        yield server


@contextmanager
def full_disk(server: Server) -> Iterator[None]:
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, NO_FILE)
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, ANY_FILE)


def post(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/responses", json={"model": "tiny", "input": "Hi", "max_output_tokens": 4, **fields})


def last_event(response: httpx.Response) -> Json:
    return json.loads(response.text.strip().split("\n\n")[-1].split("data: ")[1])


def test_who_asks_for_a_response_that_is_kept_learns_that_it_is_not(keeper: Server) -> None:
    with keeper.client() as client:
        before = post(client).json()
        with full_disk(keeper):
            for background in (False, True):
                refused = post(client, background=background)
                assert refused.status_code == 500
                assert refused.json()["error"]["code"] == "response_not_stored"
                assert refused.headers["x-should-retry"] == "false"
            last = last_event(post(client, stream=True))
            assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
            assert last["response"]["store"] is False
            assert "could not be stored" in last["response"]["error"]["message"]
            assert post(client, store=False).status_code == 200
            assert last_event(post(client, store=False, stream=True))["response"]["store"] is False
            unread = client.get(f"/v1/responses/{before['id']}")  # that it was read would be noted
            assert unread.status_code == 500
            assert "store of responses" in unread.json()["error"]["message"]
        assert client.get(f"/v1/responses/{last['response']['id']}").status_code == 404
        assert client.get(f"/v1/responses/{before['id']}").json()["id"] == before["id"]
        assert post(client, previous_response_id=before["id"]).json()["store"] is True


def test_a_response_in_the_background_that_was_not_kept_is_told_about(keeper: Server) -> None:
    with keeper.client() as client:
        client.post("/pause", params={"mode": "keep"})
        started = post(client, background=True).json()
        assert started["status"] == "queued"
        path = f"/v1/responses/{started['id']}"
        with full_disk(keeper):
            client.post("/resume")
            wait_until(lambda: client.get(path).json()["status"] not in ("queued", "in_progress"))
            found = client.get(path).json()
            assert (found["status"], found["store"]) == ("failed", False)
            assert "could not be stored" in found["error"]["message"]
            assert found["output"]
            followed = client.get(path, params={"stream": "true"})
            assert last_event(followed)["type"] == "response.failed"
            assert client.post(f"{path}/cancel").status_code == 400
        assert client.delete(path).json()["deleted"] is True
        assert client.get(path).status_code == 404
