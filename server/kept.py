"""What a server keeps between requests: responses, and the files of batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from octavo.server.files import Files
from octavo.server.options import ServerOptions
from octavo.server.store import OFF, ResponseStore, StoreError


@dataclass(frozen=True)
class Kept:
    """responses: None where they are not kept."""

    responses: ResponseStore | None
    files: Files

    def close(self) -> None:
        """Write what is queued, and remove what is temporary."""
        if self.responses is not None:
            self.responses.close()
        self.files.close()


def open_kept(options: ServerOptions, ending: str | None = None) -> Kept:
    """Open both. Raises StoreError, which names the option. ending: see ResponseStore."""
    directory = None if options.batch_dir is None else Path(options.batch_dir)
    try:
        files = Files(directory, options.batch_size, options.batch_files)
    except (OSError, msgspec.DecodeError) as error:
        raise StoreError(f"--batch-dir {options.batch_dir!r}: {error}") from None
    if options.response_store == OFF:
        return Kept(None, files)
    store = ResponseStore(options.response_store, options.response_store_size, options.response_store_ttl, ending)
    return Kept(store, files)
