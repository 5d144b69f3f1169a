"""The image's file: hadolint judges it, and the context holds what it copies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_context_is_what_the_file_copies() -> None:
    lines = [line.split() for line in DOCKERFILE.read_text().splitlines()]
    copied = {name for line in lines if line[:1] == ["COPY"] and "--from=build" not in line for name in line[1:-1]}
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    rooms = {path.name for path in (ROOT / "src/octavo").iterdir() if path.is_symlink()}
    assert rooms <= copied
    assert all((ROOT / name).exists() for name in copied)
