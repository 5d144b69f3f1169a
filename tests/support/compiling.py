"""Processes in which Triton compiles for an H100 that isn't there, beside the suite's own, which interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that doesn't interpret, and imports what this one can."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def printed(script: str | Path, *words: object, **more: str) -> Any:
    """What a script prints last, as JSON, in such a process."""
    command = [sys.executable, str(script), *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def be_an_h100() -> None:
    """In that process: what asks Triton's driver for its GPU is told of one from now on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    )
