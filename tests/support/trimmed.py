"""Trimmed fixtures made whole: what a quantized model has in common with its base is kept once; so with `tiny-moe`."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHARED = ("model.embed_tokens.weight", "lm_head.weight")


def whole(fixture: Path, into: Path) -> Path:
    """The checkpoint `fixture` with the tables of its base model in it, in `into`; itself where nothing is missing."""
    (path,) = (path for path in fixture.glob("*.safetensors") if path.name != "expected.safetensors")
    tensors, base = load_file(path), fixture.parent / fixture.name.partition("--")[0]
    missing = [name for name in SHARED if name not in tensors]
    if not missing or fixture == base:
        return fixture
    tables = load_file(base / "model.safetensors")
    dtype = tensors["model.norm.weight"].dtype  # some writers store what they don't quantize as float16
    out = into / fixture.name
    out.mkdir()
    for side in fixture.glob("*.json"):
        shutil.copy(side, out)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()  # torchao's says what tensors are
    added = {name: tables[name].to(dtype) for name in missing if name in tables}
    save_file(tensors | added, out / path.name, metadata=metadata)
    return out
