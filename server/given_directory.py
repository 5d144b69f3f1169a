"""A directory that a request names, on the server's file system."""

from __future__ import annotations

from pathlib import Path


def within(path: str, root: Path | None, flag: str) -> Path:
    """The directory without `~` and links. Raises ValueError where it isn't within `root`, the value of this flag."""
    try:
        directory = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path[:200]!r} is no path: {error}") from None
    if root is not None and not directory.is_relative_to(root):
        raise ValueError(f"{path[:200]!r} is not within {flag}")
    return directory
