"""Server-sent events from bytes that arrive in any pieces, and one line from the many shapes of servers' errors.

It knows the framing and OpenAI's error object, not what an event says. Lines end with LF, CR or CRLF and nothing else:
str.splitlines, which httpx's iter_lines uses, also splits at U+2028, which JSON strings may contain unescaped.
"""

from __future__ import annotations

import json
from typing import Any

MAX_SHOWN = 300  # characters of a server's answer that are repeated to the user


class EventSplitter:
    """feed() takes bytes as they come and gives the data of each event that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that end within `piece`, an event's several data lines joined by LF."""
        lines = (self._rest + piece).splitlines(keepends=True)
        # a CR at the end may be the half of a CRLF
        self._rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        events = []
        for line in lines:
            content = line.rstrip(b"\r\n")
            if content.startswith(b"data:"):
                self._data.append(content[6:] if content[5:6] == b" " else content[5:])
            elif not content and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events  # comments, event names and ids are not used by these APIs


def error_message(body: Any) -> str | None:
    """The message in a server's JSON: OpenAI's {"error": {...}}, or what vLLM, FastAPI and llama.cpp also send."""
    if not isinstance(body, dict):
        return None
    found = body.get("error") or (body.get("message") if body.get("object") == "error" else body.get("detail"))
    if isinstance(found, dict) and "message" in found:
        found = found["message"]
    if not found:
        return None
    text = found if isinstance(found, str) else json.dumps(found)
    return one_line(text)


def http_error(status: int, body: bytes) -> str:
    """One line for an answer that is no success: the error object's message, or the beginning of what came."""
    text = body.decode(errors="replace")
    try:
        message = error_message(json.loads(text))
    except ValueError:
        message = None
    message = message or one_line(text)
    return f"HTTP {status}: {message}" if message else f"HTTP {status}"


def one_line(text: str) -> str:
    """The text with white space made single spaces, cut after a few lines."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN else line[:MAX_SHOWN] + "..."
