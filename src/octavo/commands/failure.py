"""An error that ends a command, in one line."""

from __future__ import annotations

from octavo.quant.printable import printable


def one_line(error: Exception) -> str:
    """The message without control characters, cut if it is long; of a system error, the file and the reason."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return printable(message)
