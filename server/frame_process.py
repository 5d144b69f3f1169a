"""The server's end of a child process that answers frames, one at a time, over a socket pair.

Who uses a process makes sure that one exchange has ended before the next begins; an exchange that fails leaves the
process unusable until it is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys

from octavo.runtime.launch import child_environment
from octavo.text.frames import LENGTH_BYTES


class FrameProcess:
    """`python -m module`. `connect` starts it, and starts another one after it has ended or was closed."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    def spawn(self) -> None:
        """Start the process and return at once, while it still imports its modules. Needs no event loop."""
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: a file in the user's directory is no module
            command = [sys.executable, "-P", "-m", self._module]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=child_environment(None))
        self._socket = ours

    async def connect(self) -> bool:
        """Start the process unless it runs. Returns True if no frame has been sent to it yet."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self.spawn()
        if self._reader is not None:
            return False
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        return True

    async def exchange(self, frame: bytes, max_answer: int | None = None) -> bytes:
        """Send a frame and return the answer; `connect` comes first.

        Raises OSError or EOFError when the process ends without an answer, or begins one of more than max_answer bytes;
        `close` it then.
        """
        assert self._reader is not None
        assert self._writer is not None
        self._writer.write(len(frame).to_bytes(LENGTH_BYTES, "little"))
        self._writer.write(frame)
        await self._writer.drain()
        size = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
        if max_answer is not None and size > max_answer:
            raise ConnectionError(f"an answer of {size} bytes; {max_answer} is the most")
        return await self._reader.readexactly(size)

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and its transports with it
                self._writer.close()
        elif self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = self._reader = self._writer = None
