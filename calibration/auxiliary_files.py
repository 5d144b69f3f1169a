"""The files of a model that are not its weights: what goes along into a quantized copy, and what does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from octavo.quant.checkpoint import PICKLE_SUFFIXES, CheckpointError
from octavo.quant.safetensors_file import parse_json

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
PATH_KEYS = ("_name_or_path", "name_or_path")  # where tokenizers and configs remember a path of some machine


def copy_other_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template, licence, custom code: all but weights and hidden files.

    Chat templates may lie in a folder of their own; other folders hold weights of other kinds and stay behind. Raises
    CheckpointError for a config that is not JSON.
    """
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in WRITTEN_HERE or path.name.endswith(WEIGHT_SUFFIXES):
            continue
        if path.is_dir():
            if path.name == "additional_chat_templates":
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            continue
        if not path.exists():
            raise CheckpointError(f"{path} is a link to nothing: the download is incomplete, or the file was moved")
        _copy(path, target / path.name)


def _copy(path: Path, target: Path) -> None:
    if path.name.endswith("_config.json"):
        try:
            content = parse_json(path.read_bytes())
        except ValueError as e:
            raise CheckpointError(f"{path} is not JSON: {e}") from e
        clean = without_paths(content)
        if clean != content:
            write_json(target, clean)
            return
    shutil.copyfile(path, target)  # follows links: a Hub snapshot is made of them


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
