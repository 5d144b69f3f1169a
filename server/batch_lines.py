"""The lines of a batch: one request each going in, one answer each coming out, both as OpenAI writes them.

An output file is its own record of what is done: whoever goes on with a batch reads it, and leaves out what is there.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

MAX_LINES = 100_000
MAX_LINE_BYTES = 32 << 20
MAX_ERRORS = 100  # that are told of one file

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch. `number` counts from 1."""

    number: int
    custom_id: str
    url: str
    body: Json


class LineError(ValueError):
    """A line that is no request; `code`, `param` and `line` are OpenAI's."""

    def __init__(self, line: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line
        self.code = code
        self.message = message
        self.param = param

    def as_json(self) -> Json:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


def routes_of(openapi: Json) -> set[str]:
    """The routes of an OpenAPI document that need a JSON object: what a batch may ask, batches themselves aside."""
    found = set()
    for path, methods in openapi["paths"].items():
        body = methods.get("post", {}).get("requestBody", {})
        needs_json = body.get("required") and "application/json" in body["content"]
        if needs_json and not path.startswith("/v1/batches") and "{" not in path:
            found.add(path)
    return found


def lines_of(file: Path, urls: Collection[str] | None) -> Generator[Line, None, None]:
    """The requests of a file, read as they are asked for. Raises LineError; what follows that line isn't read.

    urls: the routes that a line may name; None: whatever it names.
    """
    seen: set[str] = set()
    with file.open("rb") as content:
        for number, text in enumerate(_short_lines(content), start=1):
            if not text.strip():
                continue
            if len(seen) >= MAX_LINES:
                raise LineError(number, "too_many_tasks", f"a batch has {MAX_LINES} requests at the most")
            line = _line(number, text, urls)
            if line.custom_id in seen:
                raise LineError(number, "duplicate_custom_id", f"custom_id {line.custom_id[:80]!r} was there before")
            seen.add(line.custom_id)
            yield line


def _short_lines(content: IO[bytes]) -> Generator[bytes, None, None]:
    number = 0
    while text := content.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(text) > MAX_LINE_BYTES:
            raise LineError(number, "line_too_long", f"the line has more than {MAX_LINE_BYTES} bytes")
        yield text


def _line(number: int, text: bytes, urls: Collection[str] | None) -> Line:
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineError(number, "invalid_json_line", f"it is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LineError(number, "invalid_json_line", "it is no JSON object")
    custom_id = fields.get("custom_id")
    body = fields.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        raise LineError(number, "missing_required_parameter", "custom_id must be a string of 1 to 512", "custom_id")
    if fields.get("method", "POST") != "POST":
        raise LineError(number, "invalid_method", "the only method is POST", "method")
    url = fields.get("url")
    if not isinstance(url, str) or (urls is not None and url not in urls):
        known = ", ".join(sorted(urls or ("a route",)))
        raise LineError(number, "invalid_url", f"url {str(url)[:80]!r} is not one of {known}", "url")
    if not isinstance(body, dict):
        raise LineError(number, "missing_required_parameter", "body must be an object", "body")
    for name in ("stream", "background"):
        if body.get(name):
            raise LineError(
                number, "invalid_request", f"body.{name}: a line's answer is written when it is whole", name
            )
    unknown = set(fields) - {"custom_id", "method", "url", "body"}
    if unknown:
        raise LineError(number, "invalid_request", f"{min(unknown)[:80]!r} is no field of a line", min(unknown))
    return Line(number, custom_id, url, body)


def answer_line(line: Line, status: int, request_id: str, body: Any) -> bytes:
    """What is written for a line that was answered. `error` is None: what went wrong is in the body, as over HTTP."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _written(line.custom_id, response, None)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """What is written for a line that was never answered."""
    return _written(custom_id, None, {"code": code, "message": message})


def _written(custom_id: str, response: Json | None, error: Json | None) -> bytes:
    fields = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(fields) + b"\n"


class _Done(msgspec.Struct):
    custom_id: str


def done_ids(file: Path) -> set[str]:
    """The custom_ids in an output file. What a killed writer left of a last line is cut off. Raises ValueError."""
    found: set[str] = set()
    if not file.exists():
        return found
    with file.open("r+b") as content:
        end = 0
        for number, text in enumerate(content, start=1):
            if not text.endswith(b"\n"):
                content.truncate(end)
                break
            end += len(text)
            try:
                found.add(msgspec.json.decode(text, type=_Done).custom_id)
            except msgspec.DecodeError as error:
                raise ValueError(f"{file}: line {number} is no answer to a batch's line: {error}") from None
    return found
