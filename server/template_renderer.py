"""The server's end of the processes that render chat templates, one job at a time each (see template_process.py).

A process that exceeds a limit is killed; the next job gets a new one. Templates of requests have a process of their
own, so that they hold up no request that uses the model's.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass

from octavo.runtime.launch import child_environment
from octavo.text.chat_template import REQUEST_ORIGIN, ChatTemplate, ChatTemplateError, TemplateLimitError
from octavo.text.template_process import LENGTH_BYTES, OUT_OF_MEMORY, REFUSED, Job, Setup

RENDER_SECONDS = 5
START_SECONDS = 60.0
MEMORY_BYTES = 1 << 30
MAX_ERROR_BYTES = 1 << 20


class RendererStoppedError(RuntimeError):
    """The server is ending and waits for templates no longer; the message says so."""


class TemplateRenderer:
    """Renders a model's templates, and those that requests bring. Use from one event loop only."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._for_model = _RenderProcess(template)
        self._for_requests = _RenderProcess(template)

    def start(self) -> None:
        """Start the process for the model's templates, which takes a moment; returns at once."""
        self._for_model.spawn()

    async def check(self) -> None:
        """Wait until that process has compiled the templates. Raises ChatTemplateError with the file and the line."""
        await self._for_model.ready("the checkpoint's chat template")

    async def render(self, request: RenderRequest) -> str:
        """The prompt of these messages. Raises ChatTemplateError or RendererStoppedError."""
        process = self._for_requests if request.origin == REQUEST_ORIGIN else self._for_model
        # shielded: a job that is under way is finished, or its answer would be taken for that of the next one
        return await asyncio.shield(process.render(request))

    def request(self, job: Job) -> RenderRequest:
        """A job as `render` takes it; encoding a long one takes milliseconds. Raises ChatTemplateError."""
        origin = self.template.choose(job.template).origin
        try:
            return RenderRequest(pickle.dumps(job, protocol=5), origin, job.max_characters)
        except RecursionError:
            raise ChatTemplateError("the messages are nested too deeply") from None

    def stop(self, message: str) -> None:
        """End the processes; jobs that are under way, and later ones, get a RendererStoppedError."""
        for process in (self._for_model, self._for_requests):
            process.refusal = message
            process.close()


@dataclass(frozen=True)
class RenderRequest:
    """An encoded job; `origin` names its template in errors."""

    frame: bytes
    origin: str
    max_characters: int


class _RenderProcess:
    """One process, started when it is needed and replaced after it was killed."""

    def __init__(self, template: ChatTemplate) -> None:
        self._setup = Setup(template, RENDER_SECONDS, MEMORY_BYTES)
        self._lock = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.refusal: str | None = None  # why nothing is rendered any more

    def spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: a file in the user's directory is no module
            command = [sys.executable, "-P", "-m", "octavo.text.template_process"]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=child_environment(None))
        self._socket = ours

    async def ready(self, origin: str) -> None:
        """Connect to the process, start one if there is none, and have it compile the templates."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self.spawn()
        if self._reader is not None:
            return
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        await self._ask(RenderRequest(pickle.dumps(self._setup, protocol=5), origin, 0), START_SECONDS)

    async def render(self, request: RenderRequest) -> str:
        async with self._lock:
            if self.refusal is not None:
                raise RendererStoppedError(self.refusal)
            await self.ready(request.origin)
            return await self._ask(request, RENDER_SECONDS)

    async def _ask(self, request: RenderRequest, seconds: float) -> str:
        """Send a request and wait for the answer. A process that doesn't give one is ended."""
        try:
            async with asyncio.timeout(seconds):
                answer = await self._exchange(request)
        except TimeoutError:
            self.close()
            raise TemplateLimitError(
                f"the chat template took longer than {seconds:g} s, the limit ({request.origin})"
            ) from None
        except (OSError, asyncio.IncompleteReadError):
            if self.refusal is not None:
                raise RendererStoppedError(self.refusal) from None
            self.close()
            raise TemplateLimitError(
                f"the chat template exceeded {RENDER_SECONDS} s of CPU time or {MEMORY_BYTES >> 20} MiB of memory, the "
                f"limits ({request.origin})"
            ) from None
        status = answer[:1]
        if status == OUT_OF_MEMORY:
            self.close()
            raise TemplateLimitError(
                f"the chat template took more than {MEMORY_BYTES >> 20} MiB of memory, the limit ({request.origin})"
            )
        text = answer[1:].decode("utf-8", "surrogatepass")
        if status == REFUSED:
            raise ChatTemplateError(text)
        return text

    async def _exchange(self, request: RenderRequest) -> bytes:
        assert self._reader is not None
        assert self._writer is not None
        self._writer.write(len(request.frame).to_bytes(LENGTH_BYTES, "little"))
        self._writer.write(request.frame)
        await self._writer.drain()
        size = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
        if size > MAX_ERROR_BYTES + 4 * request.max_characters:  # nothing that template_process.py would send
            raise ConnectionError(size)
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
