"""A model by path or by Hub id: either way a local directory."""

from __future__ import annotations

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

    The snapshot is downloaded if it isn't in `cache`, or in the Hub's own one. Honors HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE, as huggingface_hub does.
    Raises CheckpointError if `model` is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            _refuse(f"--revision {revision} is for a Hub id; {model} is a local directory")
        return path
    if path.is_file() and path.suffix == GGUF:
        from octavo.quant.gguf.directory import directory_of

        return directory_of(path)
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
    if path.suffix == GGUF and path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model.rstrip("/").rpartition("/")[2]


def hub_id(model: str) -> str | None:
    """The Hub id that `model` is; None for a directory or a file of this machine."""
    return None if Path(model).expanduser().exists() else model


def _refuse(message: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(message) from cause
