"""Batches: files of requests, which are answered when nobody else needs the engine; see batch_run.py.

Each answer is appended to the batch's output as soon as it is there, so a batch whose server ended goes on where it
was, if its directory is kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp

from octavo.server.batch_lines import LineError, done_ids, error_line, lines_of
from octavo.server.batch_run import DAY_SECONDS, ENDED, Batch, BatchRun, ServerEndsError, SpareCapacity, Status
from octavo.server.errors import ApiError
from octavo.server.files import Files

logger = logging.getLogger(__name__)

MOST_BATCHES = 1_000

Json = dict[str, Any]


class Batches:
    """All batches of one server. Use from one event loop only."""

    def __init__(self, app: ASGIApp, files: Files, spare: SpareCapacity) -> None:
        self._app = app
        self._files = files
        self._spare = spare
        self._by_id: dict[str, Batch] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def resume(self) -> None:
        """Go on with the batches that the files' directory tells of, where there is one that is kept."""
        directory = self._files.kept_in
        found = [] if directory is None else [file.read_bytes() for file in directory.glob("batch_*.json")]
        for batch in sorted((msgspec.json.decode(content, type=Batch) for content in found), key=_age):
            self._by_id[batch.id] = batch
            if batch.status not in ENDED:
                self._start(batch)

    def create(self, owner: str, endpoint: str, file_id: str, metadata: Mapping[str, str], keep: int | None) -> Batch:
        """Begin a batch. Raises ApiError."""
        self._files.get(file_id, owner, "input_file_id")
        self._files.room()
        while len(self._by_id) >= MOST_BATCHES:
            oldest = next((name for name, batch in self._by_id.items() if batch.status in ENDED), None)
            if oldest is None:
                raise ApiError(429, f"{MOST_BATCHES} batches are under way, which is all that may; try again later")
            del self._by_id[oldest]
            (self._files.directory / f"{oldest}.json").unlink(missing_ok=True)
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            owner=owner,
            endpoint=endpoint,
            input_file_id=file_id,
            output=self._files.new_path()[0],
            failures=self._files.new_path()[0],
            created_at=int(time.time()),
            metadata=dict(metadata),
            keep_seconds=keep,
        )
        self._by_id[batch.id] = batch
        self._save(batch)
        self._start(batch)
        return batch

    def get(self, batch_id: str, owner: str) -> Batch:
        """Raises ApiError."""
        batch = self._by_id.get(batch_id)
        if batch is None or batch.owner != owner:
            raise ApiError(404, f"no batch of the id {batch_id[:80]!r} is here")
        return batch

    def all_of(self, owner: str) -> list[Batch]:
        """Its owner's batches, the newest first."""
        return [batch for batch in reversed(self._by_id.values()) if batch.owner == owner]

    def cancel(self, batch: Batch) -> None:
        """End it where it is; it is `cancelled` once its answers so far are in a file. Raises ApiError."""
        if batch.status in ENDED and batch.status != "cancelled":
            raise ApiError(400, f"batch {batch.id!r} can't be cancelled: it has ended already, as {batch.status}")
        if batch.status not in ("cancelled", "cancelling"):
            self._move(batch, "cancelling")
            self._tasks[batch.id].cancel()

    def _start(self, batch: Batch) -> None:
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch.id, None))

    def _move(self, batch: Batch, status: Status) -> None:
        batch.status = status
        batch.times.setdefault(status, int(time.time()))
        self._save(batch)

    def _save(self, batch: Batch) -> None:
        self._files.write_json(f"{batch.id}.json", msgspec.json.encode(batch))

    async def _run(self, batch: Batch) -> None:
        """From its beginning, or from where it was, to its end."""
        try:
            if batch.status == "validating" and not await self._validate(batch):
                return
            if batch.status == "in_progress":
                deadline = batch.created_at + DAY_SECONDS - time.time()
                async with asyncio.timeout(deadline):
                    await BatchRun(self._app, self._files, self._spare, batch).all()
            self._finish(batch, "cancelled" if batch.status == "cancelling" else "completed")
        except asyncio.CancelledError:
            if batch.status == "cancelling":  # else the server is ending, and goes on another time
                self._finish(batch, "cancelled")
        except TimeoutError:
            self._finish(batch, "expired")
        except ServerEndsError:
            pass
        except Exception as error:
            logger.exception("a batch broke off")
            batch.errors.append({"code": "server_error", "line": None, "message": str(error), "param": None})
            self._finish(batch, "failed")

    async def _validate(self, batch: Batch) -> bool:
        path = self._files.path(batch.input_file_id)
        total, errors = await asyncio.to_thread(_checked, path, batch.endpoint)
        batch.total = total
        batch.errors = errors
        self._move(batch, "failed" if errors else "in_progress")
        return not errors

    def _finish(self, batch: Batch, status: Status) -> None:
        """Make its files known, those lines that were never answered among them."""
        self._move(batch, "finalizing")
        if status == "expired":
            self._write_unanswered(batch)
        for name, kind in ((batch.output, "output"), (batch.failures, "error")):
            path = self._files.path(name)
            if path.exists() and path.stat().st_size:
                filename = f"{batch.id}_{kind}.jsonl"
                self._files.add(name, batch.owner, filename, "batch_output", batch.keep_seconds)
                setattr(batch, f"{kind}_file_id", name)
        self._move(batch, status)

    def _write_unanswered(self, batch: Batch) -> None:
        done = done_ids(self._files.path(batch.output)) | done_ids(self._files.path(batch.failures))
        message = "the batch was not completed within its 24 hours"
        with self._files.path(batch.failures).open("ab") as failures:
            for line in lines_of(self._files.path(batch.input_file_id), {batch.endpoint}):
                if line.custom_id not in done:
                    failures.write(error_line(line.custom_id, "batch_expired", message))
                    batch.failed += 1


def _age(batch: Batch) -> int:
    return batch.created_at


def _checked(file: Path, url: str) -> tuple[int, list[Json]]:
    """How many requests a file has, and what is wrong with it."""
    total = 0
    try:
        for _ in lines_of(file, {url}):
            total += 1
    except LineError as error:
        return total, [error.as_json()]
    except OSError:
        return total, [{"code": "invalid_file", "line": None, "message": "the input file was deleted", "param": None}]
    if not total:
        return 0, [{"code": "empty_file", "line": None, "message": "the input file has no line", "param": None}]
    return total, []
