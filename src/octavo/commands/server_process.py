"""One of several server processes of `octavo serve`, which starts it: `python -m octavo.commands.server_process`.

It is told everything over its stdin, by the process that has the engines (server/processes/parent.py).
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from octavo.collector import uncollected


def main() -> int:
    """Serve until the parent says so, or ends; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent passes them on
        signal.signal(number, signal.SIG_IGN)
    with uncollected():
        from octavo.commands.server_child import run
    return run(socket.socket(fileno=os.dup(0)))


if __name__ == "__main__":
    sys.exit(main())
