"""The sockets on which several server processes accept."""

from __future__ import annotations

import os
import socket

from octavo.server.listen_sockets import handles


def test_another_process_never_finds_its_handle_blocking() -> None:
    """The blocking mode belongs to what all duplicates share, so one process's event loop would stand in accept."""
    with socket.create_server(("127.0.0.1", 0)) as first:
        first.setblocking(False)  # as the event loop of a process that serves already has it
        with socket.socket(fileno=os.dup(first.fileno())) as second:  # as a process that starts finds it
            for duplicate in handles(second, num_processes=32)[1:]:
                with duplicate:
                    assert not os.get_blocking(first.fileno())
