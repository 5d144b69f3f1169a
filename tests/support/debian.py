"""Programs that tests find on the machine, which Debian's packages bring."""

from __future__ import annotations

import shutil

import pytest


def tool(name: str, package: str) -> str:
    """The program's path; a test that needs it fails where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: apt-get install {package}")
    return found
