"""What a process that runs a command ends with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = """
import sys
from octavo import cli
from octavo.commands import inspect

def interrupted(args):
    {how}

inspect.run = interrupted
sys.exit(cli.main(["inspect", "model"]))
"""


@pytest.mark.parametrize("how", ["raise KeyboardInterrupt", "exec('raise KeyboardInterrupt')"])
def test_an_interrupt_is_130_wherever_it_comes(tmp_path: Path, how: str) -> None:
    """Dataclasses and named tuples are made by exec(), so that it is where an import may be interrupted.

    As a module, as `python -m octavo` is; CPython looks at it in no script.
    """
    (tmp_path / "interrupted.py").write_text(INTERRUPTED.format(how=how))
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (130, "octavo inspect: interrupted\n")
