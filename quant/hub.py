"""A model by path or by Hub id: either way a local directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from octavo.quant.model_files import CheckpointError

# The files to download: everything in a model's directory but weights in pickles, GGUF or ONNX.
GGUF = ".gguf"
ALLOWED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "*.md",
    "quantization_report.html",  # the server's page shows it
    "LICENSE*",
    "NOTICE*",
]


def resolve_model(model: str, revision: str | None = None, cache: str | None = None) -> Path:
    """The directory of `model`: the path itself if it is one, that of a GGUF file, or the snapshot of that Hub id.

    DIR:Q4_K_M is the GGUF file of a directory whose name has this word, as llama.cpp and vLLM say it; a directory with
    one GGUF file and no config.json is that file.
    The snapshot is downloaded if it isn't in `cache`, or in the Hub's own one. Honors HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE, as huggingface_hub does.
    Raises CheckpointError if `model` is neither.
    """
    path = Path(model).expanduser()
    file = _gguf_file(model)
    if revision is not None and (file is not None or path.is_dir()):
        _refuse(f"--revision {revision} is for a Hub id; {model} is of this machine")
    if file is not None:
        from octavo.quant.gguf.directory import directory_of

        return directory_of(file)
    if path.is_dir():
        return path
    if path.exists():
        _refuse(f"{model} is a file; a model is a directory with config.json and safetensors files, or a .gguf file")
    looks_local = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_local:
        _refuse(f"{model}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=ALLOWED))
    except HFValidationError as e:
        _refuse(f"{model} is neither a directory nor a Hub id: {e}", e)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        _refuse(f"{model} is not a local directory, and the Hub did not provide it: {reason}", e)


def model_name(model: str) -> str:
    """A directory's own name, or a Hub id's last part: no path of this machine is in a report."""
    path = Path(model).expanduser()
    file = _gguf_file(model)
    if file is not None:
        return file.stem
    return path.resolve().name if path.is_dir() else model.rstrip("/").rpartition("/")[2]


def hub_id(model: str) -> str | None:
    """The Hub id that `model` is; None for a directory or a file of this machine."""
    return None if Path(model).expanduser().exists() or _gguf_file(model) is not None else model


def _gguf_file(model: str) -> Path | None:
    """The GGUF file that `model` is, or names in its directory; None where it is something else.

    Raises CheckpointError for a directory in which it isn't clear which is meant.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path if path.suffix == GGUF else None
    word = ""
    if not path.exists():
        begin, _, word = model.rpartition(":")
        path = Path(begin).expanduser()
        if not begin or not word or not path.is_dir():
            return None
    elif not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob(f"*{GGUF}"))
    if not files and not word:
        return None  # whoever opens it says what is missing
    meant = [file for file in files if not word or _has_word(file.stem, word)]
    if len(meant) == 1:
        return meant[0]
    there = ", ".join(file.name for file in files) or "none"
    if not word:
        _refuse(f"{model} has {len(files)} GGUF files ({there}): name one, such as {model}:Q4_K_M")
    raise CheckpointError(f"{path} has {len(meant) or 'no'} GGUF files with {word} in their names; there are: {there}")


def _has_word(stem: str, word: str) -> bool:
    """Whether a file's name has a word, whatever the case: Q4_K is none of model-Q4_K_M's."""
    return re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9_])", stem, re.IGNORECASE) is not None


def _refuse(message: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(message) from cause
