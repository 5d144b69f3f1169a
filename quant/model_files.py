"""The small files in a model's directory (JSON, templates), read as what they are: files that anybody may have made.

Knows no tensor and imports no torch: the server's process reads them too. Whatever is wrong with such a file is a
CheckpointError that names it.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from octavo.quant.printable import shown

MAX_BYTES = 256 << 20  # the largest that models have are vocabularies of some 40 MB
ANEW = "download or save it anew"


class CheckpointError(ValueError):
    """A directory that is not a checkpoint that can be served or quantized; the message says what is wrong with it."""


def check_regular(path: Path) -> None:
    """Raise CheckpointError for a path that would block (a FIFO), never end (a device) or not fit into memory.

    FileNotFoundError where there is nothing.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to nothing: the download is incomplete") from None
        raise
    except OSError as e:
        raise CheckpointError(f"{path} can't be read: {e.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is {_kind(status.st_mode)}; a regular file is needed")
    if status.st_size > MAX_BYTES:
        raise CheckpointError(
            f"{path} has {status.st_size:,} bytes; a file of its kind has at most {MAX_BYTES:,}, so it is not one"
        )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_text(path: Path) -> str:
    """A text file's content. Raises CheckpointError; FileNotFoundError where there is none."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}): {ANEW}") from None
    except OSError as e:
        raise CheckpointError(f"{path} can't be read: {e.strerror}") from None


def parse_json(raw: str | bytes, *, unique_keys: bool = False) -> Any:
    """json.loads; whatever is wrong with the text is a ValueError. unique_keys: so is an object with a key twice."""
    try:
        return json.loads(raw, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return content


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises CheckpointError; FileNotFoundError where there is none."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as e:
        state = f"not JSON: {e}" if text.strip() else "empty"
        raise CheckpointError(f"{path} is {state}; {ANEW}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError; FileNotFoundError where there is none."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {_json_name(content)}, not an object: {ANEW}")
    return content


def read_object_if_any(path: Path) -> dict[str, Any]:
    """As `read_object`, but {} where there is no such file."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}


def _json_name(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]
