"""The process that decodes large bodies: `python -m octavo.server.body_process`, started by the server.

It gets pickles of (type, body) from the server, which is trusted, and answers with a pickle of the checked value or
with what is wrong. It ends when the server closes the socket, which is its stdin.
"""

from __future__ import annotations

import gc
import pickle
import sys
from typing import Any

import msgspec
from pydantic import TypeAdapter

from octavo.server.bodies import DECODED, OUT_OF_MEMORY, REFUSED, validated
from octavo.server.errors import ApiError
from octavo.text.answering import answer_frames, limit_memory, server_link

MEMORY_BYTES = 1 << 30  # beside what the process has at start; 4 million token ids, the most, take 400 MB


def main() -> int:
    """Decode until the socket is closed; returns the exit code."""
    link = server_link()
    limit_memory(MEMORY_BYTES)
    gc.disable()  # decoded values have no reference cycles, and looking for them would take most of the time
    return answer_frames(link, _answer, OUT_OF_MEMORY)


def _answer(frame: bytes) -> bytes:
    try:
        annotation, content = pickle.loads(frame)
        kind: TypeAdapter[Any] = TypeAdapter(annotation)
        return DECODED + pickle.dumps(validated(content, kind), protocol=5)
    except ApiError as error:
        return REFUSED + msgspec.msgpack.encode((error.status, error.message, error.param))
    except MemoryError:
        return OUT_OF_MEMORY


if __name__ == "__main__":
    sys.exit(main())
