"""An engine without a model: a process that speaks the real one's protocol, and whose tokens are known beforehand.

`python tests/support/fake_engine.py ADDRESS` is what `octavo.runtime.process` is; `launcher` starts such engines in the
place of real ones. A prompt with the token POISON kills whatever engine computes it, one with FREEZE stops its process,
with HANG its loop; FAILS lets it say that it can't go on. STEP_SECONDS in the environment is how long a step takes;
with a prompt that has LONG in it a step has LONG_LAYERS more, of LAYER_SECONDS each.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from octavo.runtime.config import EngineConfig
from octavo.runtime.launch import EngineStart, Launcher, heartbeat_address, progress_path, remove_socket
from octavo.runtime.link import Link
from octavo.runtime.messages import (
    AbortRequest,
    AddRequest,
    Asleep,
    EngineStats,
    Failed,
    Logprobs,
    Pause,
    Ping,
    Pong,
    Ready,
    Resume,
    SamplingParams,
    Shutdown,
    Sleep,
    StartupReport,
    StepOutputs,
    TokenOutput,
    Vocabulary,
)
from octavo.runtime.parallel.config import Devices, ParallelConfig
from octavo.runtime.parallel.lifeline import end_with_parent, read_line, start_heartbeat
from octavo.runtime.process import open_link
from octavo.runtime.progress import Progress
from octavo.runtime.shared_link import SharedLink
from octavo.runtime.vision.recipes import VisionModel, WholeImage

VOCAB = 1024
BLOCK = 128
POISON = 1000
FREEZE = 1001
FAILS = 1002
WANTS_VOCABULARY = 1003  # a prompt with it is refused by an engine that has none
HANG = 1004
LONG = 1005
LONG_LAYERS = 20
LAYER_SECONDS = 0.05
GIVEN_BACK = 4096  # bytes, when it is put to sleep
STEP = "FAKE_ENGINE_STEP_SECONDS"
LONGEST = "FAKE_ENGINE_LONGEST"  # the longest sequence that it takes; 4096
SEES = "FAKE_ENGINE_SEES"  # placeholders of an image; it reads text alone


def token_at(prompt: list[int], params: SamplingParams, position: int) -> int:
    """The token of an answer at a position. Without a seed, where there is need of one, each engine has its own."""
    seed = params.seed if params.seed is not None else (os.getpid() if params.temperature else 0)
    return (sum(prompt) * 7919 + len(prompt) * 31 + seed * 101 + position * 104729 + position * position) % 997


def expected(request: AddRequest, number: int = 0) -> list[int]:
    """All tokens of one of its answers."""
    answer = request.answers()[number]
    return [token_at(answer.token_ids, answer.params, position) for position in range(answer.params.max_tokens)]


def launcher(num_engines: int, addresses: Callable[[int], list[str]] = lambda _: []) -> Launcher:
    """Starts fake engines, whatever the number of cores."""
    config = EngineConfig(model="fake", parallel=ParallelConfig(data_parallel_size=num_engines))
    return Launcher(config, (str(Path(__file__)),), Devices(tuple(range(num_engines)), num_engines), addresses)


class _Answer:
    def __init__(self, request: AddRequest, num_cached: int) -> None:
        self.request = request
        self.num_cached = num_cached
        self.prompt = request.token_ids[: request.prompt_length]
        self.position = len(request.token_ids) - request.prompt_length
        self.is_new = True

    def step(self) -> TokenOutput:
        """Its next token."""
        params = self.request.params
        token = token_at(self.prompt, params, self.position)
        self.position += 1
        first: dict[str, object] = {}
        if self.is_new:
            now = time.time()
            first = {"num_cached_tokens": self.num_cached, "scheduled_time": now, "first_token_time": now}
            if params.prompt_logprobs is not None:
                first["prompt_logprobs"] = [None, *(Logprobs(it, -1.0, 1, [], []) for it in self.prompt[1:])]
        self.is_new = False
        finish_reason = "length" if self.position >= params.max_tokens else None
        logprobs = [Logprobs(token, -1.0, 1, [], [])] if params.logprobs is not None else None
        return TokenOutput(self.request.request_id, [token], finish_reason, logprobs=logprobs, **first)  # type: ignore[arg-type]


class _Engine:
    def __init__(self, link: Link | SharedLink, progress: Progress, step_seconds: float) -> None:
        self._link = link
        self._progress = progress
        self._step_seconds = step_seconds
        self._answers: dict[str, _Answer] = {}
        self._is_paused = False
        self._has_vocabulary = False
        self._num_prompt = 0
        self._seen: set[tuple[int, ...]] = set()

    def run(self) -> None:
        """Until Shutdown."""
        while True:
            has_work = bool(self._answers) and not self._is_paused
            refused: list[TokenOutput] = []
            if not has_work:
                self._progress.rest()
                self._link.wait()
            self._progress.work()
            for message in self._link.receive():
                match message:
                    case AddRequest():
                        refused += self._add(message)
                    case AbortRequest():
                        for request_id in message.request_ids:
                            self._answers.pop(request_id, None)
                    case Ping():
                        self._link.send(Pong(message.nonce))
                    case Pause():
                        self._is_paused = True
                    case Resume():
                        self._is_paused = False
                    case Sleep():
                        self._seen.clear()
                        problem = f"{len(self._answers)} requests are open" if self._answers else ""
                        self._link.send(Asleep(GIVEN_BACK, problem))
                    case Vocabulary():
                        self._has_vocabulary = True
                    case Shutdown():
                        return
            self._step(refused)

    def _add(self, request: AddRequest) -> list[TokenOutput]:
        if WANTS_VOCABULARY in request.token_ids and not self._has_vocabulary:
            return [TokenOutput(it, [], "error", error="no vocabulary") for it in request.request_ids]
        for answer in request.answers():
            assert answer.request_id not in self._answers
            self._answers[answer.request_id] = _Answer(answer, self._num_cached(answer.token_ids))
            self._num_prompt += len(answer.token_ids)
        return []

    def _num_cached(self, token_ids: list[int]) -> int:
        """How many of a prompt's tokens it has seen as another one's beginning, in whole blocks."""
        blocks = [tuple(token_ids[:end]) for end in range(BLOCK, len(token_ids), BLOCK)]
        num_cached = BLOCK * sum(block in self._seen for block in blocks)
        self._seen.update(blocks)
        return num_cached

    def _step(self, refused: list[TokenOutput]) -> None:
        outputs = list(refused)
        if self._answers and not self._is_paused:
            if self._step_seconds:
                time.sleep(self._step_seconds)
            if any(LONG in answer.prompt for answer in self._answers.values()):
                for _ in range(LONG_LAYERS):
                    time.sleep(LAYER_SECONDS)
                    self._progress.mark()
            outputs += [answer.step() for answer in self._answers.values()]
        for answer in self._answers.values():
            if answer.position > 2 and POISON in answer.prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if answer.position > 2 and FREEZE in answer.prompt:
                os.kill(os.getpid(), signal.SIGSTOP)
            while answer.position > 2 and HANG in answer.prompt:
                time.sleep(1)
            if answer.position > 2 and FAILS in answer.prompt:
                raise RuntimeError("it was told to")
        for output in outputs:
            if output.finish_reason is not None:
                self._answers.pop(output.request_id, None)
        step_tokens = len(outputs) + self._num_prompt
        self._num_prompt = 0
        self._link.send(StepOutputs(outputs, EngineStats(len(self._answers), 0, 0.0, 0, 0, 0, step_tokens)))


def main() -> int:
    """Run the engine until it is told to end; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    address = sys.argv[1]
    start = msgspec.json.decode(read_line(0), type=EngineStart)
    end_with_parent(lambda: remove_socket(address))
    start_heartbeat(heartbeat_address(address))
    context = zmq.Context()
    link = open_link(context, address, start.addresses)
    report = StartupReport("fake", "fake", "float32", f"cpu, {start.index}", "float32", [], 0, 0, {})
    try:
        count = int(os.environ.get(SEES, "0"))
        vision = VisionModel(WholeImage((28, 28), None, 3, count), 5, 5, 1) if count else None
        link.send(Ready(int(os.environ.get(LONGEST, "4096")), 1000, 16, VOCAB, report, vision=vision))
        _Engine(link, Progress(progress_path(address)), float(os.environ.get(STEP, "0"))).run()
    except RuntimeError as error:
        link.send(Failed(str(error)))
        return 1
    finally:
        link.close()
        context.term()
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)
