"""The real engine process over a real socket, with a tiny real checkpoint."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import zmq
from forked_commands import fork_children

import octavo
from octavo.runtime import launch
from octavo.runtime.config import EngineConfig
from octavo.runtime.launch import EngineProcess, start_engine
from octavo.runtime.messages import (
    AbortRequest,
    AddRequest,
    Failed,
    FromEngine,
    Ping,
    Pong,
    Ready,
    ResetPrefixCache,
    SamplingParams,
    Shutdown,
    StepOutputs,
    ToEngine,
    TokenOutput,
)
from octavo.runtime.parallel.config import ParallelConfig

pytestmark = pytest.mark.long

PATIENCE_MS = 60_000  # not a measurement: only so that a hang is a failure
TINY = Path(__file__).parents[1] / "fixtures" / "tiny"


class Client:
    """The server's end, without a server."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine: EngineProcess = start_engine(config)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.bind(self.engine.address)
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def send(self, message: ToEngine) -> None:
        self.send_frame(msgspec.msgpack.encode(message))

    def send_frame(self, frame: bytes) -> None:
        self._socket.send(frame)

    def receive(self) -> FromEngine:
        assert self._socket.poll(PATIENCE_MS), "the engine says nothing"
        return self._decoder.decode(self._socket.recv())

    def outputs(self) -> StepOutputs:
        """The next step's outputs, past anything else."""
        while True:
            message = self.receive()
            if isinstance(message, StepOutputs):
                return message

    def first_output(self, request_id: str) -> TokenOutput:
        """Wait for the first word about a request."""
        while True:
            for output in self.outputs().outputs:
                if output.request_id == request_id:
                    return output

    def generate(self, *requests: AddRequest) -> dict[str, tuple[list[int], str]]:
        """Tokens, and finish reason or error, of each request."""
        for request in requests:
            self.send(request)
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        ends: dict[str, str] = {}
        while len(ends) < len(requests):
            for output in self.outputs().outputs:
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    assert output.request_id not in ends
                    ends[output.request_id] = output.error or output.finish_reason
        return {name: (tokens[name], ends[name]) for name in ends}

    def ping(self, nonce: int) -> list[FromEngine]:
        """What came before the answer."""
        self.send(Ping(nonce))
        before: list[FromEngine] = []
        while (message := self.receive()) != Pong(nonce):
            before.append(message)
        return before

    def exit_code(self) -> int:
        return self.engine.process.wait(PATIENCE_MS / 1000)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        self._socket.close(linger=0)
        self._context.term()


def config(model: Path = TINY, **settings: object) -> EngineConfig:
    return EngineConfig(**({"model": str(model), "dtype": "float32", "num_threads": 1, "num_blocks": 64} | settings))


def request(name: str, token_ids: list[int] | None = None, **params: object) -> AddRequest:
    settings = {"max_tokens": 12, "temperature": 0.0} | params
    return AddRequest(name, token_ids or [5, 6, 7, 8], SamplingParams(**settings), time.time())


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Client, Ready]]:
    with Client(config()) as client:
        ready = client.receive()
        assert isinstance(ready, Ready), ready
        yield client, ready


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines and their ranks are forked; the first test's is a new interpreter, as users have it."""
    fork_children(monkeypatch)


@pytest.fixture
def client(served: tuple[Client, Ready]) -> Client:
    return served[0]


def test_ready_tells_what_was_started(served: tuple[Client, Ready]) -> None:
    ready = served[1]
    assert (ready.vocab_size, ready.num_blocks, ready.block_size, ready.max_model_len) == (1024, 64, 16, 512)
    report = ready.report
    assert (report.architecture, report.dtype, report.kv_cache_dtype) == ("llama", "float32", "float32")
    assert list(report.seconds) == ["import", "kernels", "weights", "kv cache", "warm-up"]
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.layers
    assert report.weight_bytes > 0


def test_the_server_sees_how_far_the_load_was(client: Client) -> None:
    assert client.engine.progress.loaded == (2, 2)


def test_the_server_imports_no_torch_with_the_seam() -> None:
    code = "import sys, octavo.runtime.launch, octavo.runtime.messages; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-P", "-c", code], env=environment).returncode == 0


def test_requests_together_get_what_each_gets_alone(client: Client) -> None:
    prompts = [list(range(3, 3 + length)) for length in (1, 5, 17, 40)]
    together = client.generate(*(request(f"t{i}", prompt) for i, prompt in enumerate(prompts)))
    client.send(ResetPrefixCache())
    for i, prompt in enumerate(prompts):
        tokens, end = client.generate(request("alone", prompt))["alone"]
        assert (tokens, end) == together[f"t{i}"]
        assert (len(tokens), end) == (12, "length")


def test_an_abort_ends_a_request_without_a_word(client: Client) -> None:
    client.send(request("long", max_tokens=400))
    client.first_output("long")
    client.send(AbortRequest(["long", "nobody"]))
    client.ping(1)
    last = client.outputs()
    assert (last.outputs, last.stats.num_running, last.stats.kv_cache_usage) == ([], 0, 0.0)


def test_a_ping_is_answered_between_steps(client: Client) -> None:
    client.send(request("busy", max_tokens=400))
    assert client.first_output("busy").first_token_time is not None
    client.ping(2)
    assert client.outputs().stats.num_running == 1, "the answer came from the loop, in the middle of its work"
    client.send(AbortRequest(["busy"]))
    client.ping(3)


def test_a_bad_request_ends_alone(client: Client) -> None:
    frame = msgspec.msgpack.encode(
        {"type": "add", "request_id": "odd", "token_ids": [1], "params": {"max_tokens": "many"}, "arrival_time": 0.0}
    )
    client.send_frame(frame)
    odd = client.first_output("odd")
    assert odd.finish_reason == "error"
    assert "params.max_tokens" in (odd.error or "")
    ends = client.generate(request("hot", temperature=float("nan")), request("good"), request("far", [9999]))
    assert "temperature nan" in ends["hot"][1]
    assert "9999 is not in the vocabulary of 1024" in ends["far"][1]
    assert ends["good"][1] == "length"


def test_signals_to_the_group_leave_it_to_the_server(client: Client) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        client.engine.process.send_signal(number)
    client.ping(4)
    assert client.generate(request("after"))["after"][1] == "length"


@pytest.mark.usefixtures("forked")
def test_closing_its_stdin_ends_it_even_in_the_middle_of_work() -> None:
    with Client(config()) as client:
        assert isinstance(client.receive(), Ready)
        client.send(request("long", max_tokens=400))
        client.first_output("long")
        client.engine.close()
        assert client.engine.exit_code() == 0
        client.engine.close()  # again: no harm


@pytest.mark.usefixtures("forked")
def test_shutdown_ends_it() -> None:
    with Client(config(max_model_len=100)) as client:
        ready = client.receive()
        assert isinstance(ready, Ready)
        assert ready.max_model_len == 100
        client.send(Shutdown())
        assert client.exit_code() == 0


@pytest.mark.usefixtures("forked")
def test_what_can_not_be_read_at_all_is_told_before_the_end() -> None:
    with Client(config()) as client:
        assert isinstance(client.receive(), Ready)
        client.send_frame(b"\xc1")
        failed = client.receive()
        assert isinstance(failed, Failed)
        assert "msgspec" in failed.traceback
        assert client.exit_code() == 1


@pytest.mark.usefixtures("forked")
def test_a_start_that_fails_says_why() -> None:
    with Client(config(Path("/nowhere/at/all"))) as client:
        failed = client.receive()
        assert isinstance(failed, Failed)
        assert "/nowhere/at/all" in failed.message
        assert failed.traceback == ""
        assert client.exit_code() == 1


def test_it_does_not_outlive_its_parent_nor_leave_its_socket() -> None:
    parent = (
        "import sys; from octavo.runtime.config import EngineConfig; from octavo.runtime.launch import *\n"
        f"engine = start_engine(EngineConfig(model={str(TINY)!r}, num_threads=1, num_blocks=64))\n"
        "print(engine.process.pid, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as directory:
        environment = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent), "TMPDIR": directory}
        with subprocess.Popen([sys.executable, "-P", "-c", parent], env=environment, **pipes) as process:
            assert process.stdout is not None
            engine = os.pidfd_open(int(process.stdout.readline()))
            assert os.listdir(directory)
            process.kill()
        assert select.select([engine], [], [], PATIENCE_MS / 1000)[0], "the engine is still there"
        os.close(engine)
        assert not os.listdir(directory)


def child_of(process: int) -> int:
    """The one process that it has started."""
    (child,) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(child)


@pytest.mark.parametrize("divided", ["tensor_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize("killed", ["follower", "driver"])
@pytest.mark.usefixtures("forked")
def test_ranks_end_together_and_leave_nothing(killed: str, divided: str) -> None:
    """Killed in the middle of work: the driver says which rank ended and how; a follower ends with the driver."""
    with Client(config(parallel=ParallelConfig(**{divided: 2}))) as client:
        ready = client.receive()
        assert isinstance(ready, Ready), ready
        assert len(ready.report.ranks) == 2
        driver = client.engine.process.pid
        follower = child_of(driver)
        watched = os.pidfd_open(follower)
        client.send(request("long", max_tokens=400))
        client.first_output("long")
        os.kill(follower if killed == "follower" else driver, signal.SIGKILL)
        if killed == "follower":
            failed = client.receive()
            while isinstance(failed, StepOutputs):
                failed = client.receive()
            assert isinstance(failed, Failed)
            assert failed.message == "rank 1 of 2 ended (killed by signal 9)"
            assert client.exit_code() == 1
        assert select.select([watched], [], [], PATIENCE_MS / 1000)[0], "the follower is still there"
        os.close(watched)


def test_a_busy_process_echoes_the_heartbeat_and_a_stopped_one_does_not(tmp_path: Path) -> None:
    """Busy means the worst: it never gives the interpreter's lock back (pause, called with the lock held)."""
    address = f"ipc://{tmp_path}/heartbeat"
    code = (
        "import ctypes, sys; from octavo.runtime.parallel.lifeline import start_heartbeat\n"
        "start_heartbeat(sys.argv[1]); print('busy', flush=True); ctypes.PyDLL(None).pause()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    command = [sys.executable, "-P", "-c", code, address]
    context = zmq.Context()
    with (
        context.socket(zmq.DEALER) as beats,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process,
    ):
        beats.linger = 0
        try:
            beats.bind(address)
            assert process.stdout is not None
            assert process.stdout.readline() == b"busy\n"
            for i in range(20):
                beats.send(bytes([i]))
                assert beats.poll(PATIENCE_MS), "no echo of a busy process"
                assert beats.recv() == bytes([i])
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            beats.send(b"stopped")
            assert not beats.poll(300)
            process.send_signal(signal.SIGCONT)
            assert beats.poll(PATIENCE_MS), "no echo of a process that goes on"
        finally:
            process.kill()
    context.term()


def test_two_threads_remove_a_directory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that is closed twice may be another file's by then."""
    both = threading.Barrier(2)
    remove_tree = launch.rmtree

    def slowly(path: str, **how: bool) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        remove_tree(path, **how)

    monkeypatch.setattr(launch, "rmtree", slowly)
    directory = launch.SocketDirectory()
    with ThreadPoolExecutor(2) as pool:
        for removal in [pool.submit(directory.remove) for _ in range(2)]:
            removal.result()
    assert not os.path.exists(directory.path)
