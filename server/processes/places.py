"""Where the processes of one server meet: a directory with their sockets, and with what they share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's


@dataclass(frozen=True)
class Places:
    """Paths in the directory of a server of so many processes.

    token: what only these processes know, and by which they tell each other's requests from clients'.
    """

    directory: str
    num_servers: int
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @property
    def board(self) -> str:
        """The file of board.py."""
        return f"{self.directory}/board"

    @property
    def metrics(self) -> Path:
        """The directory of prometheus_client's files: one of each kind for each process that ever was."""
        return Path(self.directory, "metrics")

    @property
    def responses(self) -> str:
        """The file of stored responses where they needn't outlive the server."""
        return f"{self.directory}/responses"

    @property
    def batches(self) -> str:
        """The directory of batches and their files, where they needn't outlive the server."""
        return f"{self.directory}/batches"

    def address(self, server: int, engine: int) -> str:
        """Of the socket between a server process, which binds it, and an engine."""
        return f"ipc://{self.directory}/server-{server}.{engine}"

    def addresses(self, engine: int) -> list[str]:
        """Of all server processes, for an engine."""
        return [self.address(server, engine) for server in range(self.num_servers)]

    def http(self, server: int) -> str:
        """The path of the Unix socket on which a server process takes requests of the others."""
        return f"{self.directory}/http-{server}"
