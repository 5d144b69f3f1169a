"""Files that clients upload for batches, and those that batches make, in a directory of the server's.

Each is two files there: its content under its id, and what is known of it as JSON beside it. A file is found only under
the owner that it was made for.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from octavo.server.errors import ApiError

FileId = str
Purpose = Literal["batch", "batch_output"]


class FileInfo(msgspec.Struct, frozen=True):
    """What is known of a file; times in seconds since the epoch."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int
    expires_at: int | None = None

    def as_json(self) -> dict[str, Any]:
        """OpenAI's shape."""
        fields = msgspec.to_builtins(self)
        del fields["owner"]
        return {"object": "file", "status": "processed", "status_details": None, **fields}


class Files:
    """All files of one server. Use from one event loop only."""

    def __init__(self, directory: Path | None, max_bytes: int, max_count: int) -> None:
        """directory: where they are kept over a restart; None: in a temporary one, made when it is needed.

        Raises OSError, and msgspec.DecodeError for a directory that holds something else.
        """
        self.kept_in = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._by_id: dict[FileId, FileInfo] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            for found in directory.glob("file-*.json"):
                info = msgspec.json.decode(found.read_bytes(), type=FileInfo)
                self._by_id[info.id] = info

    @property
    def directory(self) -> Path:
        """Where the files are."""
        if self.kept_in is not None:
            return self.kept_in
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="octavo-batches-")
        return Path(self._temporary.name)

    def room(self) -> int:
        """How many bytes a new file may have. Raises ApiError where there is no room for one."""
        self._drop_expired()
        left = self._max_bytes - sum(info.bytes for info in self._by_id.values())
        if len(self._by_id) >= self._max_count or left <= 0:
            raise ApiError(
                413,
                f"this server keeps {self._max_count} files of {self._max_bytes} bytes together (--batch-files, "
                "--batch-size), and that is there already; delete some",
            )
        return left

    def new_path(self) -> tuple[FileId, Path]:
        """The id of a file to come, and where it is to be written; `add` makes it known."""
        file_id = f"file-{uuid.uuid4().hex}"
        return file_id, self.path(file_id)

    def path(self, file_id: FileId) -> Path:
        """Where a file's content is."""
        return self.directory / file_id

    def add(self, file_id: FileId, owner: str, filename: str, purpose: Purpose, seconds: int | None = None) -> FileInfo:
        """Make a file known that has been written. seconds: for how long it is kept."""
        now = int(time.time())
        size = self.path(file_id).stat().st_size
        info = FileInfo(file_id, owner, filename, purpose, size, now, None if seconds is None else now + seconds)
        self._write(self.directory / f"{file_id}.json", msgspec.json.encode(info))
        self._by_id[file_id] = info
        return info

    def get(self, file_id: FileId, owner: str, param: str | None = None) -> FileInfo:
        """Raises ApiError."""
        self._drop_expired()
        info = self._by_id.get(file_id)
        if info is None or info.owner != owner:
            raise ApiError(404, f"no file of the id {file_id[:80]!r} is here", param=param)
        return info

    def all_of(self, owner: str, purpose: str | None) -> Iterator[FileInfo]:
        """Its owner's files, the oldest first."""
        self._drop_expired()
        for info in sorted(self._by_id.values(), key=lambda info: (info.created_at, info.id)):
            if info.owner == owner and purpose in (None, info.purpose):
                yield info

    def delete(self, file_id: FileId) -> None:
        """Forget a file."""
        del self._by_id[file_id]
        for path in (self.path(file_id), self.directory / f"{file_id}.json"):
            path.unlink(missing_ok=True)

    def write_json(self, name: str, content: bytes) -> None:
        """Keep some bytes under a name of the directory: all of them or none."""
        self._write(self.directory / name, content)

    def _write(self, path: Path, content: bytes) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.replace(path)

    def _drop_expired(self) -> None:
        now = time.time()
        for info in list(self._by_id.values()):
            if info.expires_at is not None and info.expires_at < now:
                self.delete(info.id)

    def close(self) -> None:
        """Remove what is temporary."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.cleanup()
