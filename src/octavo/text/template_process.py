"""The process that renders chat templates: `python -m octavo.text.template_process`, started by the server.

A template is code that nobody has checked: here it gets limits on CPU time, memory and output, and can be killed. The
process ends when the server closes the socket, which is its stdin.

Frames go in either direction (frames.py). From the server come pickles (the server is trusted; pickle keeps what JSON
values msgpack can't, such as large integers): a Setup, then Jobs. Back come a byte of status and UTF-8 text, which the
server does no more than decode: a template that broke out of the sandbox may have written it.
"""

from __future__ import annotations

import math
import pickle
import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from octavo.text.answering import answer_frames, limit_memory, send_answer, server_link
from octavo.text.chat_template import ChatTemplate, ChatTemplateError, Message
from octavo.text.frames import receive_frame

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
    link = server_link()
    first = receive_frame(link)
    if first is None:
        return 0
    setup: Setup = pickle.loads(first)
    limit_memory(setup.memory_bytes)
    if not send_answer(link, _answer(setup, None), OUT_OF_MEMORY):
        return 1
    return answer_frames(link, partial(_answer, setup), OUT_OF_MEMORY)


def _answer(setup: Setup, frame: bytes | None) -> bytes:
    """Of the templates, which are checked (no frame), or of a job, which is rendered."""
    _limit_time(setup.cpu_seconds)
    try:
        if frame is None:
            setup.template.check()
            return RENDERED
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
        return RENDERED + text.encode("utf-8", "surrogatepass")
    except ChatTemplateError as error:
        return REFUSED + str(error).encode("utf-8", "surrogatepass")
    except MemoryError:
        return OUT_OF_MEMORY


def _limit_time(seconds: int) -> None:
    """Let the system end the process after so many CPU seconds; the server's own clock usually ends it first."""
    soft = math.ceil(time.process_time()) + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(main())
