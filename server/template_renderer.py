"""The server's end of the processes that render chat templates, one job at a time each (see template_process.py).

A process that exceeds a limit is killed; the next job gets a new one. Templates of requests have a process of their
own, so that they hold up no request that uses the model's.
"""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import dataclass

from octavo.server.frame_process import FrameProcess
from octavo.text.chat_template import REQUEST_ORIGIN, ChatTemplate, ChatTemplateError, TemplateLimitError
from octavo.text.template_process import OUT_OF_MEMORY, REFUSED, Job, Setup

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
        # shielded: a job that has begun is finished; otherwise its answer would be taken for the next job's
        return await asyncio.shield(process.render(request))

    def request(self, job: Job) -> RenderRequest:
        """A job as `render` takes it; encoding a long one takes milliseconds. Raises ChatTemplateError."""
        origin = self.template.choose(self.template.name_for(job.template, has_tools=bool(job.tools))).origin
        try:
            return RenderRequest(pickle.dumps(job, protocol=5), origin, job.max_characters)
        except RecursionError:
            raise ChatTemplateError("the messages are nested too deeply") from None

    def stop(self, message: str) -> None:
        """End the processes; jobs that are under way, and later ones, get a RendererStoppedError."""
        for process in (self._for_model, self._for_requests):
            process.stop(message)


@dataclass(frozen=True)
class RenderRequest:
    """An encoded job; `origin` names its template in errors."""

    frame: bytes
    origin: str
    max_characters: int


class _RenderProcess:
    """A process that renders templates; it gets the templates themselves whenever it is started."""

    def __init__(self, template: ChatTemplate) -> None:
        self._setup = Setup(template, RENDER_SECONDS, MEMORY_BYTES)
        self._lock = asyncio.Lock()
        self._process = FrameProcess("octavo.text.template_process")
        self._refusal: str | None = None  # why nothing is rendered any more

    def spawn(self) -> None:
        self._process.spawn()

    async def ready(self, origin: str) -> None:
        """Start the process unless it runs, and have it compile the templates. Raises ChatTemplateError."""
        if await self._process.connect():
            await self._ask(RenderRequest(pickle.dumps(self._setup, protocol=5), origin, 0), START_SECONDS)

    async def render(self, request: RenderRequest) -> str:
        async with self._lock:
            if self._refusal is not None:
                raise RendererStoppedError(self._refusal)
            await self.ready(request.origin)
            return await self._ask(request, RENDER_SECONDS)

    async def _ask(self, request: RenderRequest, seconds: float) -> str:
        """Send a request and wait for the answer. A process that doesn't give one is ended."""
        max_answer = MAX_ERROR_BYTES + 4 * request.max_characters  # template_process.py sends nothing longer
        try:
            async with asyncio.timeout(seconds):
                answer = await self._process.exchange(request.frame, max_answer)
        except TimeoutError:
            self._process.close()
            raise TemplateLimitError(
                f"the chat template took longer than {seconds:g} s, the limit ({request.origin})"
            ) from None
        except (OSError, EOFError):
            if self._refusal is not None:
                raise RendererStoppedError(self._refusal) from None
            self._process.close()
            raise TemplateLimitError(
                f"the chat template exceeded {RENDER_SECONDS} s of CPU time or {MEMORY_BYTES >> 20} MiB of memory, the "
                f"limits ({request.origin})"
            ) from None
        status = answer[:1]
        if status == OUT_OF_MEMORY:
            self._process.close()
            raise TemplateLimitError(
                f"the chat template took more than {MEMORY_BYTES >> 20} MiB of memory, the limit ({request.origin})"
            )
        text = answer[1:].decode("utf-8", "surrogatepass")
        if status == REFUSED:
            raise ChatTemplateError(text)
        return text

    def stop(self, message: str) -> None:
        self._refusal = message
        self._process.close()
