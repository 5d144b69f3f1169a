"""`octavo serve` that ends with whoever has started it: `python -m octavo.commands.tied_server WORDS` (own_server.py).

Its stdin is a pipe that nothing is written to. When that closes, however the process at its other end has ended, the
server is told to end, as by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from octavo.cli import main


def end_with_starter() -> None:
    """From now on this process gets a SIGTERM when its stdin ends."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="octavo-tie", daemon=True).start()


if __name__ == "__main__":
    end_with_starter()
    sys.exit(main(["serve", *sys.argv[1:]]))
