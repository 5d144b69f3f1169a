"""A model by path or by Hub id: either way a local directory."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import NoReturn

from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import printable

# The files to download: everything in a model's directory but weights in pickles, GGUF or ONNX.
GGUF = ".gguf"
NO_MODELS = ("mmproj", "imatrix")  # what GGUF files begin with that lie beside a model and are none
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

    DIR:Q4_K_M and owner/name:Q4_K_M are the GGUF file of a directory, or of the Hub's, whose name has this word, as
    llama.cpp and vLLM say it; one with a single GGUF file, and no weights for transformers, is that file. A model in
    several files, NAME-00001-of-00003.gguf and so on, counts as one.
    What isn't in `cache`, or in the Hub's own one, is downloaded. Honors HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as
    huggingface_hub does.
    Raises CheckpointError if `model` is neither.
    """
    path = Path(model).expanduser()
    file = _gguf_file(model)
    if revision is not None and (file is not None or path.is_dir()):
        _refuse(f"--revision {revision} is for a Hub id; {model} is of this machine")
    if file is not None:
        return _directory_of(file)
    if path.is_dir():
        return path
    if path.exists():
        _refuse(f"{model} is a file; a model is a directory with config.json and safetensors files, or a .gguf file")
    looks_local = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_local:
        _refuse(f"{model}: no such directory")
    word = model.partition(":")[2]
    if not word:
        directory = _download(model, revision, cache, ALLOWED)
        if any(directory.rglob("*.safetensors")):
            return directory
    names = _gguf_names(model, revision, cache)
    if not names and not word:
        return directory  # whoever opens it says what is missing
    meant = _meant(names, word, model)
    snapshot = _download(model, revision, cache, [glob.escape(name) for name in meant])
    if not (snapshot / meant[0]).is_file():
        _refuse(f"{model}: the Hub did not provide {meant[0]}")
    return _directory_of(snapshot / meant[0])


def model_name(model: str) -> str:
    """A directory's own name, or a Hub id's last part: no path of this machine is in a report."""
    path = Path(model).expanduser()
    file = _gguf_file(model)
    if file is not None:
        from octavo.quant.gguf.parts import name_of

        return name_of(file.stem)
    return path.resolve().name if path.is_dir() else model.rstrip("/").rpartition("/")[2]


def hub_id(model: str) -> str | None:
    """The Hub id that `model` is, without what names a file of it; None for a directory or a file of this machine."""
    if Path(model).expanduser().exists() or _gguf_file(model) is not None:
        return None
    return model.partition(":")[0]


def _download(model: str, revision: str | None, cache: str | None, allowed: list[str]) -> Path:
    """The snapshot of a Hub id, of which these files are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo = model.partition(":")[0]
    try:
        return Path(snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=allowed))
    except HFValidationError as e:
        _refuse(f"{model} is neither a directory nor a Hub id: {e}", e)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        _refuse(f"{model} is not a local directory, and the Hub did not provide it: {_first_line(e)}", e)


def _gguf_names(model: str, revision: str | None, cache: str | None) -> list[str]:
    """The GGUF files that the Hub has under this id, or the cache where the Hub can't be asked."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo = model.partition(":")[0]
    try:
        names = HfApi().list_repo_files(repo, revision=revision)
    except HFValidationError as e:
        _refuse(f"{model} is neither a directory nor a Hub id: {e}", e)
    except Exception as e:  # also its HTTP library's own, which is another in every one of its versions
        try:  # the snapshot's place, whatever it has: no file is demanded of it
            held = Path(
                snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True, allow_patterns=[])
            )
        except Exception:
            _refuse(f"{model} is not a local directory, and the Hub did not provide it: {_first_line(e)}", e)
        names = [path.relative_to(held).as_posix() for path in held.rglob(f"*{GGUF}")]
    return sorted(name for name in names if name.endswith(GGUF) and not Path(name).name.startswith(NO_MODELS))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _directory_of(file: Path) -> Path:
    from octavo.quant.gguf.directory import directory_of

    return directory_of(file)


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
    names = sorted(file.name for file in path.glob(f"*{GGUF}") if not file.name.startswith(NO_MODELS))
    if not names and not word:
        return None  # whoever opens it says what is missing
    return path / _meant(names, word, model)[0]


def _meant(names: list[str], word: str, model: str) -> list[str]:
    """Of GGUF files' names the one that has a word, or its parts, the first first. Raises CheckpointError."""
    from octavo.quant.gguf.parts import name_of

    models: dict[str, list[str]] = {}
    for name in names:
        models.setdefault(name_of(name.removesuffix(GGUF)), []).append(name)
    meant = [files for own, files in models.items() if not word or _has_word(own, word)]
    if len(meant) == 1:
        return meant[0]
    where = model.removesuffix(f":{word}")
    there = ", ".join(printable(f"{own}{GGUF}", 200) for own in models) or "none"
    if not word:
        _refuse(f"{where} has {len(models)} GGUF files ({there}): name one, such as {where}:Q4_K_M")
    raise CheckpointError(f"{where} has {len(meant) or 'no'} GGUF files with {word} in their names; there are: {there}")


def _has_word(stem: str, word: str) -> bool:
    """Whether a file's name has a word, whatever the case: Q4_K is none of model-Q4_K_M's."""
    return re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9_])", stem, re.IGNORECASE) is not None


def _refuse(message: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(message) from cause
