"""Trimmed fixtures made whole: what a quantized `tiny` has in common with `tiny` is kept once."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

SHARED = ("model.embed_tokens.weight", "lm_head.weight")


def whole(fixture: Path, into: Path) -> Path:
    """The checkpoint `fixture` with the tables of `tiny` in it, in `into`; itself where nothing is missing."""
    tensors = load_file(fixture / "model.safetensors")
    missing = [name for name in SHARED if name not in tensors]
    if not missing or fixture.name == "tiny":
        return fixture
    tables = load_file(fixture.parent / "tiny" / "model.safetensors")
    out = into / fixture.name
    out.mkdir()
    for path in fixture.glob("*.json"):
        shutil.copy(path, out)
    save_file(tensors | {name: tables[name] for name in missing}, out / "model.safetensors")
    return out
