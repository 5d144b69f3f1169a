"""A child process that is asked by frames over a socket pair, one at a time: 4 bytes of length and the content."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys

from octavo.runtime.launch import child_environment

LENGTH_BYTES = 4


class FrameProcess:
    """`python -m module`, started when it is first asked, and again after it has ended or was closed."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def exchange(self, frame: bytes) -> bytes:
        """The answer to a frame. Raises OSError or EOFError when the process ends without one; then `close` it."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            await self._start()
        assert self._reader is not None
        assert self._writer is not None
        self._writer.write(len(frame).to_bytes(LENGTH_BYTES, "little"))
        self._writer.write(frame)
        await self._writer.drain()
        size = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
        return await self._reader.readexactly(size)

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: a file in the user's directory is no module
            command = [sys.executable, "-P", "-m", self._module]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=child_environment(None))
        self._reader, self._writer = await asyncio.open_connection(sock=ours)

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and its transports with it
                self._writer.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._reader = self._writer = None
