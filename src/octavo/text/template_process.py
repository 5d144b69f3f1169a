"""The process that renders chat templates: `python -m octavo.text.template_process`, started by the server.

A template is code that nobody has checked: here it gets limits on CPU time, memory and output, and can be killed. The
process ends when the server closes the socket, which is its stdin.

Frames go in either direction (frames.py). From the server come pickles (the server is trusted; pickle keeps what JSON
values msgpack can't, such as large integers): a Setup, then Jobs. Back come a byte of status and UTF-8 text, which the
server does no more than decode: a template that broke out of the sandbox may have written it.
"""

from __future__ import annotations

import math
import os
import pickle
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.text.chat_template import ChatTemplate, ChatTemplateError, Message
from octavo.text.frames import frame_of, receive_frame

RENDERED = b"T"
REFUSED = b"E"  # a ChatTemplateError
OUT_OF_MEMORY = b"M"  # the process ends after saying so


@dataclass(frozen=True)
class Setup:
    """The first frame: the templates, and the limits of one rendering. The answer is RENDERED, or what is wrong."""

    template: ChatTemplate
    cpu_seconds: int
    memory_bytes: int


@dataclass(frozen=True)
class Job:
    """The arguments of ChatTemplate.render; max_characters limits what the template may write."""

    messages: list[Message]
    max_characters: int
    template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: list[dict[str, Any]] | None = None
    variables: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


def main() -> int:
    """Render until the socket is closed; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server drains first, then ends us
        signal.signal(number, signal.SIG_IGN)
    link = socket.socket(fileno=os.dup(0))
    first = receive_frame(link)
    if first is None:
        return 0
    setup: Setup = pickle.loads(first)
    limit_memory(setup.memory_bytes)
    _limit_time(setup.cpu_seconds)
    if not _answer(link, setup, None):
        return 1
    while (frame := receive_frame(link)) is not None:
        _limit_time(setup.cpu_seconds)
        if not _answer(link, setup, frame):
            return 1
    return 0


def _answer(link: socket.socket, setup: Setup, frame: bytes | None) -> bool:
    """Check the templates (no frame), or render a job; whether the process can go on."""
    try:
        if frame is None:
            setup.template.check()
            content = RENDERED
        else:
            job: Job = pickle.loads(frame)
            text = setup.template.render(
                job.messages,
                template=job.template,
                add_generation_prompt=job.add_generation_prompt,
                continue_final_message=job.continue_final_message,
                tools=job.tools,
                documents=job.documents,
                variables=job.variables,
                max_characters=job.max_characters,
            )
            content = RENDERED + text.encode("utf-8", "surrogatepass")
    except ChatTemplateError as error:
        content = REFUSED + str(error).encode("utf-8", "surrogatepass")
    except MemoryError:
        content = OUT_OF_MEMORY
    try:
        link.sendall(frame_of(content))
    except (BrokenPipeError, ConnectionResetError):
        return False  # the server was killed meanwhile
    return content != OUT_OF_MEMORY


def _limit_time(seconds: int) -> None:
    """Let the system end the process after so many CPU seconds; the server's own clock usually ends it first."""
    soft = math.ceil(time.process_time()) + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_memory(num_bytes: int) -> None:
    """Limit the process to num_bytes more than it has now; there is no limit without /proc, which says how many."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + num_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    sys.exit(main())
