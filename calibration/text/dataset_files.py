"""From what a person names, a file, a directory or a data set of the Hub, to the files of text in it.

The `datasets` library tells which files are a split: by the configurations that a README.md states, else by their
names. Files are fetched one after the other, only as many as it takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from octavo.calibration.text.documents import SUFFIXES, DataError, quiet_datasets

DEFAULT_SPLIT = "train"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")


@dataclass(frozen=True)
class DatasetFiles:
    """Names in a fixed order, how to get one (which may take a download), and what a report calls the whole."""

    names: list[str]
    fetch: Callable[[str], Path]
    label: str


def find_dataset(dataset: str | Path) -> DatasetFiles:
    """A local file, a directory of files, or a Hub id: 'owner/name', 'owner/name:split', 'owner/name:config/split'.

    Raises DataError when it is none of them, or when it is not clear which of its files are meant.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        return DatasetFiles([path.name], lambda _: path, path.name)
    if path.is_dir():
        return DatasetFiles(_local_files(path, None, None, str(path)), lambda name: path / name, path.name)
    if HUB_ID.fullmatch(str(dataset)) and path.suffix not in SUFFIXES:
        repo, _, wanted = str(dataset).partition(":")
        config, _, split = wanted.rpartition("/")
        return _hub_files(repo, config or None, split or None)
    raise DataError(
        f"--dataset {dataset}: no such file or directory, and no id of the Hub ('owner/name' or 'owner/name:split')"
    )


def _hub_files(repo: str, config: str | None, split: str | None) -> DatasetFiles:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        commit = str(HfApi().dataset_info(repo).sha)
    except OfflineModeIsEnabled:
        directory = _cached(snapshot_download, repo)
        commit = directory.name
        names = _local_files(directory, config, split, repo)
    except HFValidationError as e:
        raise DataError(f"--dataset {repo} is no local file, and no id of the Hub: {e}") from e
    except Exception as e:  # also its HTTP library's own, which is another in every one of its versions
        raise DataError(f"--dataset {repo} is no local file, and the Hub did not give it: {_first_line(e)}") from e
    else:
        root = f"hf://datasets/{repo}@{commit}/"
        names = _inside(_split_files(repo, config, split, repo, revision=commit), root, repo)

    def fetch(name: str) -> Path:
        try:
            # not by the commit: then the cache would not know which one 'main' is, and nothing be found offline
            path = Path(hf_hub_download(repo, name, repo_type="dataset"))
        except Exception as e:
            raise DataError(f"{repo}: the Hub did not give {name}: {_first_line(e)}") from e
        if commit not in path.parts:
            raise DataError(f"{repo} changed while it was downloaded: run it again")
        return path

    wanted = "/".join(part for part in (config, split) if part)
    return DatasetFiles(names, fetch, f"{repo}{':' + wanted if wanted else ''} at {commit[:8]}")


def _local_files(directory: Path, config: str | None, split: str | None, where: str) -> list[str]:
    root = f"{directory.absolute().as_posix()}/"
    return _inside(_split_files(root, config, split, where), root, where)


def _split_files(source: str, config: str | None, split: str | None, where: str, **options: Any) -> list[str]:
    """Paths of a split's files in order, of a directory or of a Hub id."""
    with quiet_datasets() as datasets:
        try:
            found = datasets.load_dataset_builder(source, config, **options).config.data_files or {}
        except Exception as e:  # of YAML, the Hub, file systems
            raise DataError(f"the data set {where} can't be used: {_shortened(str(e), where)}") from e
    splits = {str(name): list(files) for name, files in found.items()}
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else DEFAULT_SPLIT
    if split not in splits:
        names = ", ".join(f"{where}:{f'{config}/' if config else ''}{name}" for name in splits)
        raise DataError(f"the data set {where} has no split {split!r}; there are {names or 'none'}")
    return splits[split]


def _shortened(error: str, where: str) -> str:
    """An error of `datasets` in a line, without its examples in Python and its list of all known suffixes."""
    lines = [line for line in error.splitlines() if line and not line.startswith(("Example", "\t"))]
    line = " ".join(lines).partition(" with any supported extension")[0]
    return f"{line}; add it after a colon: {where}:CONFIG/{DEFAULT_SPLIT}" if "Config name is missing" in line else line


def _inside(files: list[str], root: str, where: str) -> list[str]:
    """Names below `root`. Files elsewhere are refused: nothing says which version of them is meant."""
    for file in files:
        if not file.startswith(root) or ".." in PurePosixPath(file).parts:
            raise DataError(f"the data set {where} takes files from elsewhere, such as {file}: give those as --dataset")
    return [file.removeprefix(root) for file in files]


def _cached(snapshot_download: Callable[..., str], repo: str) -> Path:
    """The snapshot that an earlier run downloaded: HF_HUB_OFFLINE forbids another download."""
    try:
        return Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
    except OSError as e:
        raise DataError(f"--dataset {repo}: HF_HUB_OFFLINE is set, and nothing of it is in the cache") from e


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
