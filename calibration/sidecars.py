"""The files of a model that are not its weights: what goes along into a quantized copy, and what does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from octavo.quant.checkpoint import PICKLE_SUFFIXES

WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".index.json")
WRITTEN_HERE = ("config.json", "quantization_report.json", "quantize_config.json", "quant_config.json")
PATH_KEYS = ("_name_or_path", "name_or_path")  # where tokenizers and configs remember a path of some machine


def copy_other_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template, licence, custom code: all but weights and hidden files.

    Chat templates may lie in a folder of their own; other folders hold weights of other kinds and stay behind.
    """
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in WRITTEN_HERE or path.name.endswith(WEIGHT_SUFFIXES):
            continue
        if path.is_dir():
            if path.name == "additional_chat_templates":
                shutil.copytree(path, target / path.name)
            continue
        _copy(path, target / path.name)


def _copy(path: Path, target: Path) -> None:
    if path.name.endswith("_config.json"):
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict) and any(key in content for key in PATH_KEYS):
            write_json(target, {key: value for key, value in content.items() if key not in PATH_KEYS})
            return
    shutil.copyfile(path, target)  # follows links: a Hub snapshot is made of them


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does, and have it on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
