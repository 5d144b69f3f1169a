"""Several server processes on one port, over real sockets and real engines: one server for all of these tests."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from octavo_server import SMALL, TINY, Server, events, said_at_once, serving_anew, started, value, wait_until

pytestmark = pytest.mark.long

NUM_SERVERS = 2
QUEUE = ("--max-num-seqs", "8", "--max-queued-requests", "4")  # of two engines: 16 and 4 places
TIMEOUT = ("--engine-timeout", "4")  # for a frozen server process to be noticed
FLAGS = ("--api-server-count", str(NUM_SERVERS), "-dp", "2", "--api-key", "one", "two", *QUEUE, *TIMEOUT)
KEY = {"Authorization": "Bearer one"}
PATH = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "x", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving_anew(*FLAGS) as running:
        yield running


def client_of(server: Server) -> httpx.Client:
    return server.client(headers=KEY)


def server_pids(server: Server) -> list[int]:
    """Of the server processes, in the order in which they were started."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    programs = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return [pid for pid, program in programs.items() if "octavo.commands.server_process" in program]


@contextmanager
def connected_to_each(server: Server) -> Iterator[list[httpx.Client]]:
    """A client for each server process, with a connection that it keeps; the id of a response tells whose that is."""
    found: dict[str, httpx.Client] = {}
    spare = []
    try:
        while len(found) < NUM_SERVERS:
            client = client_of(server)
            response = client.post("/v1/responses", json={"input": "x", "max_output_tokens": 1}).json()
            number = response["id"][-2:]
            if number in found:
                spare.append(client)
            else:
                found[number] = client
        yield [found[number] for number in sorted(found)]
    finally:
        for client in (*found.values(), *spare):
            client.close()


def value_of(client: httpx.Client, name: str) -> float:
    """A counter's sum over the engines."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name + "{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def text_value(client: httpx.Client, name: str) -> float:
    """A sample without labels."""
    [line] = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name + " ")]
    return float(line.rsplit(" ", 1)[1])


def in_flight(client: httpx.Client) -> float:
    """Sequences that the engines have, running and waiting."""
    return value_of(client, "vllm:num_requests_running") + value_of(client, "vllm:num_requests_waiting")


@contextmanager
def begun(server: Server, count: int) -> Iterator[list[Iterator[str]]]:
    """Long streams, each on a connection of its own, of each of which something has come."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            client = stack.enter_context(client_of(server))
            lines = stack.enter_context(client.stream("POST", PATH, json=LONG)).iter_lines()
            found.append(chain([next(lines)], lines))
        yield found


def text_of(lines: Iterator[str]) -> str:
    """All of a stream that must be whole."""
    chunks = list(events(lines))
    assert chunks[-1]["choices"][0]["finish_reason"] == "length", chunks[-1]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_what_keeps_it_from_starting_is_one_line(tmp_path: Path) -> None:
    """Though each process reads the same files."""
    said = said_at_once(str(TINY), "--port", "0", *FLAGS[:2], "--tokenizer", str(tmp_path / "none"))
    assert "no such directory" in said


def test_what_one_process_alone_can_t_open_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = said_at_once(str(TINY), "--port", "0", *FLAGS[:2], *SMALL, "--batch-dir", str(tmp_path / "file"))
    assert "--batch-dir" in said
    assert "File exists" in said


def test_a_stop_while_the_engine_loads_leaves_nothing() -> None:
    with TemporaryDirectory(dir="/tmp") as directory, started(*FLAGS[:2], environment={"TMPDIR": directory}) as server:
        wait_until(lambda: len(server_pids(server)) == NUM_SERVERS)
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "Traceback" not in server.said
        wait_until(lambda: not os.listdir(directory))


def test_all_processes_answer_alike(server: Server) -> None:
    with connected_to_each(server) as clients:
        texts = {client.post(PATH, json=SHORT).json()["choices"][0]["text"] for client in clients}
        assert len(texts) == 1
        cards = [client.get("/v1/models").json()["data"][0]["id"] for client in clients]
        assert len(set(cards)) == 1
        assert [client.get("/health").status_code for client in clients] == [200] * NUM_SERVERS
    with server.client() as nobody:
        assert nobody.get("/health").status_code == 200
        assert nobody.post(PATH, json=SHORT).status_code == 401


def test_beams_are_searched_from_any_process(server: Server) -> None:
    asked = SHORT | {"use_beam_search": True, "n": 2}
    with connected_to_each(server) as clients:
        found = [client.post(PATH, json=asked).json()["choices"] for client in clients]
    assert found[0] == found[1]
    assert [len(choice["text"]) > 0 for choice in found[0]] == [True] * 2


def test_each_page_of_metrics_has_the_sums(server: Server) -> None:
    name = "vllm:request_success_total"
    labels = {"finished_reason": "length"}

    def total(client: httpx.Client) -> float:
        text = client.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith(name) and 'finished_reason="length"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    with connected_to_each(server) as clients:
        before = total(clients[0])
        for client in clients:
            for _ in range(3):
                client.post(PATH, json=SHORT)
        assert [total(client) for client in clients] == [before + 6] * NUM_SERVERS, labels
        ups = [line for line in clients[0].get("/metrics").text.splitlines() if line.startswith("octavo:engine_up{")]
        assert sorted(line.rsplit(" ", 1)[1] for line in ups) == ["1.0", "1.0"]
        assert text_value(clients[1], "process_resident_memory_bytes") > 3 * 30e6, "of three processes"
        for counter in ("octavo:engine_restarts_total", "vllm:prefix_cache_queries_total", "octavo:routing_total"):
            assert counter in clients[1].get("/metrics").text


def test_each_process_knows_what_all_have_under_way(server: Server) -> None:
    with connected_to_each(server) as clients:
        asked = clients[0].build_request("POST", PATH, json=LONG | {"n": 8})
        response = clients[0].send(asked, stream=True)
        lines = response.iter_lines()
        first = next(lines)
        loads = [client.get("/load").json()["server_load"] for client in clients[1:]]
        assert loads == [8], "the others see what one has under way"
        wait_until(lambda: sum(one["num_reqs"] for one in clients[1].get("/get_load").json()) == 8)
        assert len(list(events(iter([first, *lines])))) > 8


def test_the_queue_is_one_for_all_processes(server: Server) -> None:
    """And so is each key's part of it: one that fills it through one process has no place in another, but others do."""
    with connected_to_each(server) as clients:
        with clients[0].stream("POST", PATH, json=LONG | {"n": 20}) as response:
            lines = response.iter_lines()  # held: the stream would end with it
            next(lines)
            refused = clients[1].post(PATH, json=SHORT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            with server.client(headers={"Authorization": "Bearer two"}) as other:
                assert other.post(PATH, json=SHORT).status_code == 200
        wait_until(lambda: clients[1].post(PATH, json=SHORT).status_code == 200)


def test_a_request_that_is_handed_over_takes_one_place(server: Server) -> None:
    """The last one that is free, though two processes see the request."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    with connected_to_each(server) as clients:
        name = clients[1].post("/open_session", json={}).json()
        body = {"input_ids": [5], "sampling_params": sampling, "session_params": {"id": name}}
        with clients[0].stream("POST", PATH, json=LONG | {"n": 19}) as response:
            lines = response.iter_lines()
            next(lines)
            answer = clients[1].post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        assert clients[0].post("/close_session", json={"session_id": name}).status_code == 200


def test_what_one_process_keeps_all_of_them_find(server: Server) -> None:
    with connected_to_each(server) as clients:
        for maker, other in (clients, clients[::-1]):
            made = maker.post("/v1/responses", json={"input": "x", "max_output_tokens": 4}).json()
            found = other.get(f"/v1/responses/{made['id']}").json()
            assert found["output"] == made["output"]
            further = {"input": "y", "previous_response_id": made["id"], "max_output_tokens": 4}
            assert other.post("/v1/responses", json=further).status_code == 200
            assert other.delete(f"/v1/responses/{made['id']}").json()["deleted"]
            assert maker.get(f"/v1/responses/{made['id']}").status_code == 404
            with server.client(headers={"Authorization": "Bearer two"}) as stranger:
                assert stranger.get(f"/v1/responses/{made['id']}").status_code == 404


def test_a_response_in_the_background_is_followed_and_cancelled_from_any_process(server: Server) -> None:
    body = {"input": "x", "max_output_tokens": 400, "background": True}
    with connected_to_each(server) as clients:
        for maker, other in (clients, clients[::-1]):
            made = maker.post("/v1/responses", json=body).json()
            with other.stream("GET", f"/v1/responses/{made['id']}?stream=true") as response:
                lines = response.iter_lines()
                first = next(line for line in lines if line.startswith("data: "))
                assert json.loads(first[6:])["response"]["id"] == made["id"]
                cancelled = maker.post(f"/v1/responses/{made['id']}/cancel")
                assert cancelled.status_code in (200, 400)  # 400: it has ended
            assert other.get(f"/v1/responses/{made['id']}").json()["status"] in ("cancelled", "completed", "incomplete")


def test_sessions_go_on_in_any_process(server: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    with connected_to_each(server) as clients:
        name = clients[1].post("/open_session", json={}).json()
        begun = {"input_ids": [5, 6, 7], "sampling_params": sampling, "rid": "a", "session_params": {"id": name}}
        first = clients[0].post("/generate", json=begun).json()
        assert first["meta_info"]["prompt_tokens"] == 3
        further = {"input_ids": [8], "sampling_params": sampling, "session_params": {"id": name, "rid": "a"}}
        second = clients[1].post("/generate", json=further).json()
        assert second["meta_info"]["prompt_tokens"] == 3 + 4 + 1
        begun = clients[1].post("/invocations", json={"requestType": "NEW_SESSION"})
        header = {"X-Amzn-SageMaker-Session-Id": begun.headers["X-Amzn-SageMaker-New-Session-Id"].partition(";")[0]}
        assert [one.post("/invocations", json=SHORT, headers=header).status_code for one in clients] == [200] * 2
        assert clients[0].post("/close_session", json={"session_id": name}).status_code == 200
        assert clients[1].post("/generate", json=further).status_code == 400


def test_a_batch_is_found_from_any_process(server: Server) -> None:
    line = {"custom_id": "a", "method": "POST", "url": PATH, "body": SHORT}
    with connected_to_each(server) as clients:
        upload = {"file": ("in.jsonl", json.dumps(line).encode())}
        file = clients[1].post("/v1/files", files=upload, data={"purpose": "batch"}).json()
        asked = {"input_file_id": file["id"], "endpoint": PATH, "completion_window": "24h"}
        batch = clients[0].post("/v1/batches", json=asked).json()
        wait_until(lambda: clients[1].get(f"/v1/batches/{batch['id']}").json()["status"] == "completed")
        output = clients[1].get(f"/v1/batches/{batch['id']}").json()["output_file_id"]
        answers = {client.get(f"/v1/files/{output}/content").text for client in clients}
        assert len(answers) == 1
        assert json.loads(answers.pop())["custom_id"] == "a"


def test_a_pause_is_for_all_processes(server: Server) -> None:
    with connected_to_each(server) as clients:
        assert clients[0].post("/pause").status_code == 200
        assert [client.get("/is_paused").json()["is_paused"] for client in clients] == [True] * NUM_SERVERS
        assert clients[1].post("/resume").status_code == 200
        assert [client.get("/is_paused").json()["is_paused"] for client in clients] == [False] * NUM_SERVERS


def test_a_request_is_aborted_from_any_process(server: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 450, "ignore_eos": True}
    with connected_to_each(server) as clients:
        for number, maker in enumerate(clients):
            body = {"input_ids": [5], "sampling_params": sampling, "rid": f"r{number}", "stream": True}
            with maker.stream("POST", "/generate", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                with client_of(server) as anybody:
                    assert anybody.post("/abort_request", json={"rid": f"r{number}"}).status_code == 200
                *_, last = events(lines)
            assert last["meta_info"]["finish_reason"]["type"] in ("abort", "length")


def test_an_engine_is_drained_by_all_processes(server: Server) -> None:
    pids = server.engine_pids
    with begun(server, 6) as streams, client_of(server) as client:
        assert client.post("/engines/1/drain").json() == {"engine": 1, "status": "replaced"}
        assert len({text_of(lines) for lines in streams}) == 1
    now = server.engine_pids
    assert pids[0] in now
    assert pids[1] not in now


def test_no_stream_is_cut_when_an_engine_dies(server: Server) -> None:
    with begun(server, 10) as streams:
        os.kill(server.engine_pids[0], signal.SIGKILL)
        assert len({text_of(lines) for lines in streams}) == 1
    with connected_to_each(server) as clients:
        for client in clients:
            wait_until(lambda client=client: value_of(client, "octavo:engine_up") == 2)


def test_a_server_process_s_death_cuts_its_streams_alone(server: Server) -> None:
    """Another one takes its place, and knows what it must: engines that have died before, and the sums of metrics."""
    victim = server_pids(server)[1]
    background = {"input": "x", "max_output_tokens": 450, "background": True}
    with connected_to_each(server) as clients, connected_to_each(server) as others:
        before = value_of(others[0], "vllm:generation_tokens_total")
        with clients[0].stream("POST", PATH, json=LONG) as living, clients[1].stream("POST", PATH, json=LONG) as dying:
            lines = living.iter_lines()
            first = next(lines)
            cut = dying.iter_lines()
            next(cut)
            made = others[1].post("/v1/responses", json=background).json()["id"]
            os.kill(victim, signal.SIGKILL)
            unknown = others[0].get(f"/v1/responses/{made}")
            assert (unknown.status_code, unknown.headers["retry-after"]) == (503, "1"), "only the dead one knew of it"
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                list(cut)
            assert text_of(chain([first], lines))
        assert clients[0].get("/health").status_code == 200
        assert value_of(clients[0], "vllm:generation_tokens_total") >= before + 400
    wait_until(lambda: "server process 1 is up again" in server.said)
    assert victim not in server_pids(server)
    assert len(server_pids(server)) == NUM_SERVERS
    with connected_to_each(server) as clients:
        assert [value_of(client, "vllm:generation_tokens_total") > before for client in clients] == [True] * 2
        restarts = [value_of(client, "octavo:engine_restarts_total") for client in clients]
        assert restarts == [2.0] * 2, "one was drained, and one was killed"
        assert {client.post(PATH, json=SHORT).status_code for client in clients} == {200}
        assert [client.get(f"/v1/responses/{made}").json()["status"] for client in clients] == ["failed"] * 2


def test_a_frozen_server_process_is_replaced(server: Server) -> None:
    """Until it is noticed, what is for it alone waits; all else goes on."""
    victim = server_pids(server)[0]
    with connected_to_each(server) as clients:
        with clients[0].stream("POST", PATH, json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(victim, signal.SIGSTOP)
            assert clients[1].get("/health").status_code == 200
            refused = clients[1].get("/v1/files")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                list(lines)
        assert clients[1].get("/health").status_code == 200
        assert clients[1].post(PATH, json=SHORT).status_code == 200
    assert (
        "server process 0 is frozen or hangs: its event loop has not turned for 4 s (--engine-timeout)" in server.said
    )
    wait_until(lambda: "server process 0 is up again" in server.said)
    assert victim not in server_pids(server)
    with connected_to_each(server) as clients:
        assert [client.get("/v1/files").status_code for client in clients] == [200] * NUM_SERVERS


def test_values_are_told_apart(server: Server) -> None:
    """The page is read by a client of Prometheus: no series stands there twice."""
    with client_of(server) as client:
        assert value(client, "vllm:num_requests_waiting") == 0
        lines = [line.rsplit(" ", 1)[0] for line in client.get("/metrics").text.splitlines() if line[0] != "#"]
        assert len(lines) == len(set(lines))


def test_sigterm_lets_every_process_finish(server: Server) -> None:
    """And nothing stays behind: no process, and no file. It is the last test of this server."""
    children = [*server_pids(server), *server.engine_pids]
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in server.engine_pids]
    directories = {found for line in commands for found in re.findall(r"/[^\0 ]*octavo-engine-[^/\0 ]+", line)}
    assert len(directories) == 2
    with begun(server, 8) as streams:
        server.send_signal(signal.SIGTERM)
        assert len({text_of(lines) for lines in streams}) == 1
    assert server.exit_code() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not any(Path(directory).exists() for directory in directories)
    assert "Traceback" not in server.said
