"""Which rank of an engine is frozen: real processes that echo, of which one is stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import zmq

import octavo
from octavo.runtime.progress import Progress
from octavo.server.heartbeat import Heartbeat

ECHO = (
    "import sys; from octavo.runtime.parallel.lifeline import start_heartbeat\n"
    "start_heartbeat(sys.argv[1], int(sys.argv[2])); print('here', flush=True); sys.stdin.read()"
)


def test_a_rank_that_is_stopped_is_named_and_one_that_never_came_is_not(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/heartbeat"
    environment = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    context = zmq.Context()
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", ECHO, address, str(rank)],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for rank in range(2)
        ]
        for process in ranks:
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"here\n"

        async def stop_one() -> str:
            heartbeat = Heartbeat(context, address, num_ranks=3)
            waiting = asyncio.create_task(heartbeat.end(1.0, Progress(str(tmp_path / "progress"))))
            while len(heartbeat._missed) < 2:
                await asyncio.sleep(0.01)
            ranks[1].send_signal(signal.SIGSTOP)
            try:
                return await waiting
            finally:
                heartbeat.close()

        assert asyncio.run(stop_one()).startswith("rank 1 of 3 is frozen: ")
    context.term()
