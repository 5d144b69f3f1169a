"""What a command says, on one line, of an error that ends it."""

from __future__ import annotations


def one_line(error: Exception) -> str:
    """The message; of the system's errors the file and the reason, without the number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)
