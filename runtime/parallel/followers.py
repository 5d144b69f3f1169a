"""The driver's side of the other ranks: starts them, tells them each step, and ends with any of them."""

from __future__ import annotations

import subprocess
import sys
import threading

import msgspec
import numpy as np
from torch import Tensor

from octavo.runtime.config import EngineConfig
from octavo.runtime.launch import child_environment
from octavo.runtime.parallel.channel import DriverChannel
from octavo.runtime.parallel.follower import FollowerStart
from octavo.runtime.parallel.order import StepOrder, largest_order
from octavo.runtime.scheduling.plan import SchedulerConfig


class Followers:
    """Ranks 1 .. of an engine on this machine.

    compares: whether each step's logits of all ranks are compared, bit for bit. It is how ranks with the same weights
    are proven to take the same orders; ranks with shares of the weights will hand over their shares the same way.
    """

    def __init__(
        self, config: EngineConfig, limits: SchedulerConfig, count: int, vocab: int, *, compares: bool
    ) -> None:
        """Starts them; they load at the same time as the driver does, and `wait` waits for all."""
        self.compares = compares
        rows = limits.max_num_seqs + limits.max_prompt_logits
        blocks = -(-limits.max_model_len // limits.block_size)
        numbers = largest_order(limits.max_num_seqs, limits.max_num_batched_tokens, blocks, len(limits.windows))
        self._channel = DriverChannel(count, numbers, rows * vocab if compares else 0)
        self.processes = [self._start(config, limits, place) for place in range(count)]
        self._is_closed = False
        for place in range(count):
            threading.Thread(target=self._watch, args=(place,), name="octavo-follower-watch", daemon=True).start()

    def _start(self, config: EngineConfig, limits: SchedulerConfig, place: int) -> subprocess.Popen[bytes]:
        ends = self._channel.ends[place]
        start = FollowerStart(config, limits, ends, len(self._channel.ends))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.runtime.parallel.follower"],
            stdin=subprocess.PIPE,
            env=child_environment(config.num_threads),
            pass_fds=ends.descriptors,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
        return process

    def _watch(self, place: int) -> None:
        """Wait for the end of a process, however it comes."""
        code = self.processes[place].wait()
        if not self._is_closed:
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self._channel.fail(f"rank {place + 1} of {len(self.processes) + 1} ended ({how})")

    def wait(self) -> None:
        """Wait until all of them are ready. Raises RuntimeError if one has ended, as all other calls do."""
        for place in range(len(self.processes)):
            self._channel.receive(place)

    def send(self, order: StepOrder) -> None:
        """Tell all of them a step, whose tokens are all known."""
        self._channel.send(order.buffer)

    def compare(self, order: StepOrder, logits: Tensor) -> None:
        """Raise RuntimeError where a rank computed other logits for the order that was sent last."""
        own = logits.cpu().numpy()
        for place in range(len(self.processes)):
            theirs = self._channel.receive(place)
            if not np.array_equal(own.view(np.int32), theirs.view(np.int32)):
                raise RuntimeError(f"rank {place + 1} computed other logits than rank 0 in step {order.number}")

    def close(self) -> None:
        """End all of them, and wait for their end."""
        self._is_closed = True
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait()
        self._channel.close()
