"""/sleep and /wake_up on servers of their own: memory is given back, and the answers are the same as before."""

from __future__ import annotations

import mmap
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from octavo_server import TINY, Server, events, num_in_flight, said_at_once, serving, tokens_of, wait_until
from peft_oracle import PeftOracle
from tiny_oracle import Oracle

PROMPT = "The cat sat on"
BODY = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
LEVELS = (1, 2)


@pytest.fixture(scope="module")
def adapter(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "one"
    PeftOracle(oracle._model, path, seed=1, r=8, lora_alpha=32)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a test may take away from the server."""
    return Path(shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def server(adapter: Path, directory: Path) -> Iterator[Server]:
    flags = ("--enable-sleep-mode", "--lora-modules", f"one={adapter}", "--num-gpu-blocks-override", "4096")
    with serving(*flags, "--served-model-name", "tiny", model=directory) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
        assert client.post("/wake_up").status_code == 200


def asleep(client: httpx.Client) -> bool:
    found: bool = client.get("/is_sleeping").json()["is_sleeping"]
    return found


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=BODY | {"max_tokens": 6, "return_token_ids": True} | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_tokens_before_and_after(server: Server, client: httpx.Client, oracle: Oracle, level: int) -> None:
    ids = oracle.ids(PROMPT * 8)
    expected = oracle.greedy(ids, 6)
    adapted = complete(client, model="one")["choices"][0]["token_ids"]
    assert adapted != complete(client)["choices"][0]["token_ids"]
    for _ in range(7):  # decode steps are recorded by then, and the recordings are used after the sleep
        assert tokens_of(client, ids, 6) == expected
    assert complete(client, prompt=ids)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert not asleep(client)
    told = client.post(f"/sleep?level={level}").json()
    assert (told["status"], told["level"]) == ("asleep", level)
    assert told["freed_bytes"] > 0
    assert len(server.engine_pids) == (level == 1)
    assert asleep(client)
    awake = client.post("/wake_up").json()
    assert (awake["status"], awake["asleep"]) == ("awake", [])
    assert not asleep(client)
    assert complete(client, prompt=ids)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for _ in range(7):
        assert tokens_of(client, ids, 6) == expected
    assert complete(client, model="one")["choices"][0]["token_ids"] == adapted
    chosen = complete(client, structured_outputs={"choice": ["yes", "no"]}, max_tokens=8, ignore_eos=False)
    assert chosen["choices"][0]["text"] in ("yes", "no")


def test_the_memory_of_the_cache_is_given_back(server: Server, client: httpx.Client) -> None:
    """As much as was written; the system's figure of the process says so too."""
    (pid,) = server.engine_pids
    client.post("/sleep?level=1")
    client.post("/wake_up")
    num_prompts, length = 24, 480
    prompts = [[5 + number] * length for number in range(num_prompts)]
    assert client.post("/v1/completions", json={"prompt": prompts, "max_tokens": 1}).status_code == 200
    cache_bytes = client.get("/server_info").json()["engine"]["kv_cache_bytes"]
    written = num_prompts * length * cache_bytes / (4096 * 16)
    before = resident(pid)
    freed = client.post("/sleep?level=1").json()["freed_bytes"]
    after = resident(pid)
    margin = 0.1 * written  # pages at the tensors' edges, and what else the process takes or gives back meanwhile
    assert written - margin < freed < cache_bytes + margin  # more than was written where the system gave huge pages
    assert abs(before - after - freed) < margin


@pytest.mark.parametrize("level", LEVELS)
def test_an_open_stream_stands_still_and_goes_on(server: Server, client: httpx.Client, level: int) -> None:
    text = complete(client, max_tokens=300)["choices"][0]["text"]
    with server.client() as other, other.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        found = events(answer.iter_lines())
        pieces = [next(found)["choices"][0]["text"]]
        assert client.post(f"/sleep?level={level}&mode=keep").status_code == 200
        assert client.post("/wake_up").status_code == 200
        pieces += [event["choices"][0]["text"] for event in found]
    assert "".join(pieces) == text


def test_open_requests_end_or_are_waited_for(server: Server, client: httpx.Client) -> None:
    for mode, reasons in (("abort", ("abort",)), ("wait", ("length",))):
        with server.client() as other, other.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
            found = events(answer.iter_lines())
            next(found)
            assert client.post(f"/sleep?mode={mode}").status_code == 200
            assert [event["choices"][0]["finish_reason"] for event in found][-1] in reasons
        assert num_in_flight(client) == 0
        client.post("/wake_up")


def test_who_asks_a_server_that_sleeps(server: Server, client: httpx.Client) -> None:
    client.post("/sleep?level=2")
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate"):
        body: dict[str, Any] = {"max_tokens": 3, "messages": [{"role": "user", "content": "a"}]}
        body = {"/generate": {"text": "a"}, "/v1/responses": {"input": "a"}, "/v1/completions": BODY}.get(path, body)
        refused = client.post(path, json={"model": "tiny"} | body if path != "/generate" else body)
        assert refused.status_code == 503, (path, refused.text)
        assert "the engines sleep; POST /wake_up wakes them" in refused.text
    health = client.get("/health")
    assert health.status_code == 503
    assert "sleep" in health.json()["error"]["message"]
    for path in ("/v1/models", "/version", "/metrics", "/is_sleeping"):
        assert client.get(path).status_code == 200
    assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
    with ThreadPoolExecutor(2) as pool:
        waking = pool.submit(client.post, "/wake_up")
        with server.client() as other:
            answers = []
            wait_until(lambda: answers.append(other.post("/v1/completions", json=BODY)) or answers[-1].is_success)
        assert waking.result().json()["status"] == "awake"
    assert client.get("/health").status_code == 200


def test_a_wake_up_that_fails(server: Server, client: httpx.Client, directory: Path) -> None:
    expected = complete(client)["choices"]
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    client.post("/sleep?level=2")
    weights.write_bytes(whole[:5000])
    failed = client.post("/wake_up")
    assert failed.status_code == 503
    assert "the engines sleep on, since they can't be woken" in failed.json()["error"]["message"]
    assert "model.safetensors is truncated" in failed.json()["error"]["message"]
    assert asleep(client)
    assert client.post("/v1/completions", json=BODY).status_code == 503
    weights.write_bytes(whole)
    assert client.post("/wake_up").json()["status"] == "awake"
    assert complete(client)["choices"] == expected
    assert server.process.poll() is None


def test_parts_and_sglang_s_names(server: Server, client: httpx.Client) -> None:
    expected = complete(client)["choices"]
    client.post("/sleep?level=2")
    told = client.post("/wake_up?tags=weights").json()
    assert (told["status"], told["asleep"]) == ("asleep", ["kv_cache"])
    assert len(server.engine_pids) == 1
    assert client.post("/v1/completions", json=BODY).status_code == 503
    assert client.post("/wake_up", params={"tags": ["weights", "kv_cache"]}).json()["status"] == "awake"
    for body, processes in (({"tags": ["kv_cache"]}, 1), (None, 0)):
        released = client.post("/release_memory_occupation", json=body).json()
        assert released["success"]
        assert len(server.engine_pids) == processes
        assert asleep(client)
        assert client.post("/resume_memory_occupation", json={"tags": ["weights"]}).json()["success"]
        assert asleep(client)
        assert client.post("/resume_memory_occupation", json={"tags": ["kv_cache"]}).json()["success"]
        assert complete(client)["choices"] == expected
    for path in ("/sleep?level=3", "/sleep?mode=x", "/wake_up?tags=cache", "/sleep?level=x"):
        assert client.post(path).status_code == 400, path
    assert client.post("/release_memory_occupation", json={"tags": ["cuda_graph"]}).status_code == 400
    with server.client() as other, other.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        found = events(answer.iter_lines())
        next(found)
        refused = client.post("/release_memory_occupation", json={})
        assert refused.status_code in (200, 409)  # it may just have ended
        list(found)
    refused = client.post("/sleep", headers={"Origin": "http://page.example"})
    assert refused.status_code == 403


def test_a_server_that_sleeps_ends(directory: Path) -> None:
    with serving("--enable-sleep-mode", model=directory) as server, server.client() as client:
        client.post("/sleep?level=2")
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_several_ranks_sleep_deep_only() -> None:
    with serving("--enable-sleep-mode", "-tp", "2") as server, server.client() as client:
        expected = tokens_of(client, PROMPT, 6)
        refused = client.post("/sleep?level=1")
        assert refused.status_code == 503
        assert "level 1 with 2 ranks in an engine is not supported; level 2 works" in refused.text
        assert tokens_of(client, PROMPT, 6) == expected
        assert client.post("/sleep?level=2").status_code == 200
        client.post("/wake_up")
        assert tokens_of(client, PROMPT, 6) == expected


def test_a_file_of_blocks_is_written_while_nothing_else_is(tmp_path: Path) -> None:
    flags = ("--enable-sleep-mode", "--kv-offloading-size", "0.01", "--kv-offloading-path", str(tmp_path))
    with serving(*flags) as server, server.client() as client:
        expected = tokens_of(client, PROMPT, 6)
        refused = client.post("/sleep?level=1")
        assert refused.status_code == 503
        assert "level 1 with --kv-offloading-path is not supported; level 2 works" in refused.text
        assert tokens_of(client, PROMPT, 6) == expected
        assert client.post("/sleep?level=2").status_code == 200
        client.post("/wake_up")
        assert tokens_of(client, PROMPT, 6) == expected


def test_where_it_is_not_open() -> None:
    with serving() as server, server.client() as client:
        for path in ("/sleep", "/wake_up", "/release_memory_occupation", "/resume_memory_occupation"):
            refused = client.post(path)
            assert refused.status_code == 403
            assert "--enable-sleep-mode" in refused.json()["error"]["message"]
        assert not asleep(client)
    line = said_at_once(str(TINY), "--enable-sleep-mode", "--api-server-count", "2")
    assert "--enable-sleep-mode with --api-server-count 2 is not supported" in line
