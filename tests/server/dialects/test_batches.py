"""/v1/files and /v1/batches over a real socket, through the official client."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from octavo_server import Server, num_in_flight, serving, value, wait_until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
PLACES = 4


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    """A server of four places, by priority, of which a batch takes three."""
    flags = ("--max-num-seqs", str(PLACES), "--scheduling-policy", "priority")
    limits = ("--batch-size", "1MiB", "--batch-files", "20")
    with serving("--served-model-name", "tiny", "--api-key", "mine", "yours", *flags, *limits) as running:
        yield running


def client_of(server: Server, key: str = "mine") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def mine(keyed: Server) -> Iterator[openai.OpenAI]:
    """A client, whose files are gone afterwards: there may be twenty."""
    with client_of(keyed) as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)


@pytest.fixture
def http(keyed: Server) -> Iterator[httpx.Client]:
    with keyed.client(headers={"authorization": "Bearer mine"}) as client:
        yield client


def lines(url: str, bodies: dict[str, Any]) -> bytes:
    made = [{"custom_id": name, "method": "POST", "url": url, "body": body} for name, body in bodies.items()]
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def begun(client: openai.OpenAI, content: bytes, endpoint: Any = CHAT, **fields: Any) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    over = ("completed", "failed", "cancelled", "expired")
    wait_until(lambda: client.batches.retrieve(batch_id).status in over)
    return client.batches.retrieve(batch_id)


def answers(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    return {line["custom_id"]: line for line in map(json.loads, client.files.content(file_id).text.splitlines())}


def test_files_are_kept_for_their_key(keyed: Server, mine: openai.OpenAI) -> None:
    made = mine.files.create(file=("in.jsonl", b"abc"), purpose="batch")
    assert (made.bytes, made.filename, made.purpose, made.status) == (3, "in.jsonl", "batch", "processed")
    assert mine.files.retrieve(made.id) == made
    assert mine.files.content(made.id).content == b"abc"
    second = mine.files.create(
        file=("two", b"d"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert second.expires_at == second.created_at + 3600
    assert {file.id for file in mine.files.list(limit=1)} == {made.id, second.id}  # over two pages
    with client_of(keyed, "yours") as yours:
        assert list(yours.files.list()) == []
        for ask in (yours.files.retrieve, yours.files.content, yours.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
    assert mine.files.delete(made.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        mine.files.retrieve(made.id)


def test_files_are_bounded(mine: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.APIStatusError, match="--batch-size") as caught:
        mine.files.create(file=("big", io.BytesIO(bytes(3 << 20))), purpose="batch")
    assert caught.value.status_code == 413
    for number in range(20):
        mine.files.create(file=(str(number), b"x"), purpose="batch")
    with pytest.raises(openai.APIStatusError, match="--batch-files") as caught:
        mine.files.create(file=("more", b"x"), purpose="batch")
    assert caught.value.status_code == 413
    assert http.get("/health").status_code == 200


FILE = {"file": ("a", b"x")}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"data": {"purpose": "batch"}}, "file"),
        ({"files": FILE}, "purpose"),
        ({"files": FILE, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({"files": FILE, "data": {"purpose": "batch", "color": "red"}}, "color"),
        (
            {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch", "expires_after[seconds]": "9"}},
            "expires_after",
        ),
        ({"json": {"purpose": "batch"}}, None),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "file"),
        ({"content": b"zzz", "headers": {"content-type": "multipart/form-data; boundary=x"}}, None),
        ({"content": b"zzz", "headers": {"content-type": "multipart/form-data"}}, None),
    ],
)
def test_what_is_no_upload_is_refused(http: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    response = http.post("/v1/files", **fields)
    assert response.status_code == 400, response.text
    if param is not None and "data" in fields and "files" in fields:
        assert response.json()["error"]["param"] == param


def test_a_batch_answers_as_the_route_itself(mine: openai.OpenAI, http: httpx.Client) -> None:
    bodies: dict[str, Any] = {
        f"n{number}": GREEDY | {"messages": [{"role": "user", "content": f"Number {number}"}], "max_tokens": 8}
        for number in range(10)
    }
    bodies["wrong"] = {"messages": MESSAGES, "temprature": 1}
    batch = begun(mine, lines(CHAT, bodies), metadata={"a": "b"})
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", CHAT, {"a": "b"})
    batch = ended(mine, batch.id)
    assert (batch.status, batch.errors) == ("completed", None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (11, 10, 1)
    found = answers(mine, batch.output_file_id)
    assert set(found) == set(bodies) - {"wrong"}
    usage = 0
    for name, line in found.items():
        alone = http.post(CHAT, json=bodies[name]).json()
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        assert line["response"]["body"]["choices"] == alone["choices"]
        usage += alone["usage"]["completion_tokens"]
    assert batch.usage.output_tokens == usage
    [failure] = answers(mine, batch.error_file_id).values()
    assert (failure["response"]["status_code"], failure["response"]["body"]["error"]["param"]) == (400, "temprature")
    assert batch.id in [each.id for each in mine.batches.list(limit=1)]


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
        ("/v1/messages", {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}),
    ],
)
def test_other_routes_can_be_asked(mine: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> None:
    batch = ended(mine, begun(mine, lines(endpoint, {"a": body}), endpoint).id)
    [line] = answers(mine, batch.output_file_id).values()
    assert line["response"]["status_code"] == 200
    if endpoint == "/v1/responses":  # it is its key's
        assert mine.responses.retrieve(line["response"]["body"]["id"]).status == "incomplete"


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"{\n", "invalid_json_line", 1),
        (lines("/v1/completions", {"a": {}}), "invalid_url", 1),
        (lines(CHAT, {"a": {}}) * 2, "duplicate_custom_id", 2),
    ],
)
def test_a_file_with_a_wrong_line_fails(mine: openai.OpenAI, content: bytes, code: str, line: int | None) -> None:
    batch = ended(mine, begun(mine, content).id)
    assert (batch.status, batch.output_file_id) == ("failed", None)
    [error] = batch.errors.data
    assert (error.code, error.line) == (code, line)


def test_what_is_refused(keyed: Server, mine: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="file-none"):
        mine.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    file = mine.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    for endpoint in ("/v1/batches", "/metrics", "/v1/files", "/v1/responses/{response_id}/cancel"):
        with pytest.raises(openai.BadRequestError, match=r"endpoint.*/v1/chat/completions"):
            mine.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")  # type: ignore[arg-type]
    with client_of(keyed, "yours") as yours, pytest.raises(openai.NotFoundError, match=file.id):
        yours.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch = ended(mine, begun(mine, b"{}").id)
    with pytest.raises(openai.BadRequestError, match="as failed"):
        mine.batches.cancel(batch.id)
    with client_of(keyed, "yours") as yours:
        assert list(yours.batches.list()) == []
        with pytest.raises(openai.NotFoundError):
            yours.batches.retrieve(batch.id)


LONG: dict[str, Any] = GREEDY | {"messages": MESSAGES, "max_tokens": 250}


def test_a_batch_takes_what_nobody_else_needs(mine: openai.OpenAI, http: httpx.Client) -> None:
    """It leaves a place free; when others need all of them it gives its own up, and begins those lines again."""
    expected = http.post(CHAT, json=LONG).json()["choices"]
    batch = begun(mine, lines(CHAT, {str(number): LONG for number in range(5)}))
    wait_until(lambda: num_in_flight(http) == PLACES - 1)
    aborted = value(http, "vllm:request_success_total", finished_reason="abort")
    together = http.post(CHAT, json=LONG | {"n": 2 * PLACES}).json()["choices"]
    assert [choice["message"] for choice in together] == [expected[0]["message"]] * 2 * PLACES
    assert value(http, "vllm:request_success_total", finished_reason="abort") > aborted
    batch = ended(mine, batch.id)
    assert batch.request_counts.completed == 5
    found = answers(mine, batch.output_file_id)
    assert [found[str(number)]["response"]["body"]["choices"] for number in range(5)] == [expected] * 5


def test_cancelling_keeps_what_is_answered(mine: openai.OpenAI, http: httpx.Client) -> None:
    batch = begun(mine, lines(CHAT, {str(number): LONG for number in range(50)}))
    wait_until(lambda: mine.batches.retrieve(batch.id).request_counts.completed > 0)
    assert mine.batches.cancel(batch.id).status == "cancelling"
    batch = ended(mine, batch.id)
    assert batch.status == mine.batches.cancel(batch.id).status == "cancelled"
    wait_until(lambda: num_in_flight(http) == 0)
    count = batch.request_counts.completed
    assert 0 < count == len(answers(mine, batch.output_file_id)) < 50


def test_a_directory_keeps_batches_over_a_restart(tmp_path: Path) -> None:
    flags = ("--served-model-name", "tiny", "--batch-dir", str(tmp_path / "kept"))
    with serving(*flags, "--max-num-seqs", "2") as server, client_of(server) as client:
        batch = begun(client, lines(CHAT, {str(number): LONG for number in range(9)}))
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 1)
        server.send_signal(signal.SIGKILL)
        server.exit_code()
    with serving(*flags) as server, client_of(server) as client:
        batch = ended(client, batch.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 9)
        text = client.files.content(batch.output_file_id).text
        assert sorted(json.loads(line)["custom_id"] for line in text.splitlines()) == sorted(map(str, range(9)))
        with server.client() as http:
            assert value(http, "vllm:request_success_total", finished_reason="length") < 9
