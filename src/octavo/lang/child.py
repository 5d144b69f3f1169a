"""A server of a program's own: `octavo serve MODEL` as a child process, which ends with this one."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from typing import IO, Any

from octavo.lang.native import RuntimeEndpoint
from octavo.own_server import OwnServer, ServerEndedError

CHOSEN_HERE = ("host", "port", "api_key", "uds")


class Runtime(RuntimeEndpoint):
    """A server of this model, on a free port of this machine, which nobody else has the key of.

    flags: those of `octavo serve` with underscores (vLLM's and SGLang's names), True for one without a value, False for
    its --no- form. launch_timeout: seconds until it must be ready. `shutdown` ends it, as do the end of a `with` block
    and that of the process. Raises ServerEndedError, ValueError, TypeError.
    """

    def __init__(
        self, model_path: str, *, launch_timeout: float = 300.0, max_connections: int = 256, **flags: Any
    ) -> None:
        wrong = [name for name in CHOSEN_HERE if name in flags]
        if wrong:
            raise ValueError(f"{wrong[0]}: Runtime chooses it; RuntimeEndpoint(url) is for a server that you start")
        words = words_of(flags)
        log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the server
        server = OwnServer([str(model_path), *words], log, {})
        self.pid = server.pid
        self.url = server.url
        self._end = weakref.finalize(self, _end, server, log)
        try:
            server.wait_until_ready(launch_timeout)
            super().__init__(server.url, server.api_key, max_connections=max_connections)
        except BaseException:
            self.shutdown()
            raise

    @property
    def endpoint(self) -> RuntimeEndpoint:
        """Itself, where SGLang's has another object."""
        return self

    def shutdown(self) -> None:
        """End the server."""
        self._end()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """The words of a command line. None leaves a flag out."""
    from octavo.server.start import arguments  # of the server's code, which other backends don't need

    return [
        word
        for name, value in flags.items()
        for word in arguments.words_of(f"--{name.replace('_', '-')}", value, own=())
    ]


def _end(server: OwnServer, log: IO[bytes]) -> None:
    server.end()
    log.close()


__all__ = ["Runtime", "ServerEndedError", "words_of"]
