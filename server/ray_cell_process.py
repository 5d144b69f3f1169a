"""`octavo serve` as a Ray replica's child: `python -m octavo.server.ray_cell_process serve MODEL ...`.

It ends when its stdin does, so it can't outlive a replica that is killed.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

from octavo.runtime.parallel.lifeline import end_with_parent


def main() -> None:
    """Serve until told to stop, or until the replica is gone."""
    directory = Path(sys.argv[sys.argv.index("--uds") + 1]).parent
    end_with_parent(partial(shutil.rmtree, directory, ignore_errors=True))
    runpy.run_module("octavo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
