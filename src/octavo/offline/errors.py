"""The server's errors as Python's: ValueError for what was asked, EngineError for an engine that can't go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

FLAG = re.compile(r"--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")


class EngineError(RuntimeError):
    """The engine could not start, or has died; the message says why."""


def in_python(message: str) -> str:
    """A message that names flags, with the keyword arguments of LLM that they are: `--max-logprobs` is max_logprobs."""
    return FLAG.sub(lambda found: found[1].replace("-", "_"), message)


@contextmanager
def python_errors() -> Iterator[None]:
    """Errors of the server's code within, raised as Python's."""
    from octavo.server.engine_client import EngineDeadError
    from octavo.server.errors import ApiError

    try:
        yield
    except ApiError as error:
        _raise(error.status, error.message)
    except EngineDeadError as error:
        _raise(503, str(error))


def _raise(status: int, message: str) -> NoReturn:
    message = in_python(message)
    if 400 <= status < 500:
        raise ValueError(message) from None
    raise EngineError(message) from None
