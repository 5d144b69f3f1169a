"""The files of a model that are not its weights: what goes along into a quantized copy, and what does not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.quant.checkpoint import PICKLE_SUFFIXES
from octavo.quant.model_files import ANEW, CheckpointError, parse_json

WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".index.json")
WRITTEN_HERE = (
    "config.json",
    "quantization_report.json",
    "quantization_manifest.json",
    "recipe.json",
    "quantize_config.json",  # what other tools say of a quantization that is another's here
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "quant_log.csv",
)
CARD = "README.md"
TEMPLATES = "additional_chat_templates"
MODULES = "modules.json"  # of sentence-transformers, whose modules have folders
MODULE = re.compile(r"\d+_\w+")
PATH_KEYS = ("_name_or_path", "name_or_path")  # where tokenizers and configs remember a path of some machine


def other_files(source: Path) -> dict[str, Path]:
    """Name -> file of what goes along: tokenizer, generation config, chat templates, licence, custom code.

    Weights, hidden files and folders stay behind, except the folder of chat templates, and those of the modules that
    sentence-transformers puts behind a model, with their weights. A stranger may have made the
    model, and its copy may be published. So a link out of the model is refused, also in place of config.json, and so is
    what is no regular file, since a device has no end. Raises CheckpointError.
    """
    _regular(source / "config.json", source)
    found: dict[str, Path] = {}
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in WRITTEN_HERE or path.name.endswith(WEIGHT_SUFFIXES):
            continue
        if path.name == TEMPLATES and path.is_dir():
            _file_of(path, source)
            found |= {f"{TEMPLATES}/{p.name}": _regular(p, source) for p in sorted(path.iterdir()) if not p.is_dir()}
        elif path.is_dir() and (source / MODULES).exists() and MODULE.fullmatch(path.name):
            _file_of(path, source)
            found |= {f"{path.name}/{p.name}": _regular(p, source) for p in sorted(path.iterdir()) if not p.is_dir()}
        elif not path.is_dir():
            found[path.name] = _regular(path, source)
    return found


def original_card(source: Path) -> str | None:
    """The text of a model's README.md; what is not UTF-8 in it is replaced, since it is for people."""
    path = source / CARD
    return _regular(path, source).read_text("utf-8", errors="replace") if os.path.lexists(path) else None


def copy_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy `other_files` into a directory. Raises CheckpointError for a config that is not JSON."""
    for name, path in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        if name.endswith("_config.json"):
            try:
                content = parse_json(path.read_bytes())
            except ValueError as e:
                raise CheckpointError(f"{name} is not JSON: {e}; {ANEW}") from e
            if (clean := without_paths(content)) != content:
                write_json(target / name, clean)
                continue
        shutil.copyfile(path, target / name)


def _regular(path: Path, source: Path) -> Path:
    """The regular file that a path in the model stands for."""
    if not path.exists():
        raise CheckpointError(f"{path} is a link to nothing: the download is incomplete, or the file was moved")
    real = _file_of(path, source)
    if not real.is_file():
        raise CheckpointError(f"{path} is no regular file but a device, a pipe or a socket; remove it")
    return real


def _file_of(path: Path, source: Path) -> Path:
    """A path with its links followed, which may lead within the model and, in the Hub's cache, to its blobs."""
    roots = [source.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path} is a link to {real}, out of the model: what it leads to would be copied; a copy of the file in "
            "its place works"
        )
    return real


def without_paths(content: Any) -> Any:
    """A JSON value without the keys that remember where a model was once loaded from, at whatever depth."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items() if key not in PATH_KEYS}
    return [without_paths(value) for value in content] if isinstance(content, list) else content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does, and have it on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
