"""The process that decodes images: `python -m octavo.server.media.process`, started by the server.

It gets jobs from the server and answers with pixels or with why there are none, in msgpack: it reads what nobody has
checked, so the server takes nothing but bytes and sizes from it. Its memory is bounded, and the server ends it when it
takes too long. It ends when the server closes the socket, which is its stdin.
"""

from __future__ import annotations

import resource
import sys

import msgspec

from octavo.server.media.frames import ImageError, frames_of
from octavo.server.media.jobs import TOO_LARGE, Answer, Job, Refused
from octavo.text.answering import answer_frames, limit_memory, server_link

MEMORY_BYTES = 1 << 30  # beside what the process has at start; MAX_PIXELS with transparency take 800 MiB


def main() -> int:
    """Decode until the socket is closed; returns the exit code."""
    link = server_link()
    limit_memory(MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return answer_frames(link, lambda frame: msgspec.msgpack.encode(_answer(frame)))


def _answer(frame: bytes) -> Answer:
    try:
        job = msgspec.msgpack.decode(frame, type=Job)
        return frames_of(job.content, job.recipe)
    except ImageError as error:
        return Refused(str(error))
    except MemoryError:
        return Refused(TOO_LARGE)


if __name__ == "__main__":
    sys.exit(main())
