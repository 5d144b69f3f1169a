"""From what a person names, a file, a directory or a data set of the Hub, to the files of text in it.

Which files of a data set are a split is told by their names, as the Hub itself does where nobody says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from octavo.calibration.text.documents import SUFFIXES, DataError

DEFAULT_SPLIT = "train"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")

# What lies beside the data in a data set's repository and ends as data does.
NOT_DATA = re.compile(r"(readme|licen[cs]e|notice|citation|requirements|dataset_infos?|dataset_dict|state)\b", re.I)


@dataclass(frozen=True)
class DatasetFiles:
    """Names in a fixed order, how to get one (which may take a download), and what a report calls the whole."""

    names: list[str]
    fetch: Callable[[str], Path]
    label: str


def find_dataset(dataset: str | Path) -> DatasetFiles:
    """A local file, a directory of files, or a Hub id, 'owner/name', 'owner/name:split', 'owner/name:folder/split'.

    Raises DataError when it is none of them, or when it is not clear which of its files are meant.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        return DatasetFiles([path.name], lambda _: path, path.name)
    if path.is_dir():
        names = [str(file.relative_to(path).as_posix()) for file in path.rglob("*") if file.is_file()]
        return DatasetFiles(choose_files(names, None, str(path)), lambda name: path / name, path.name)
    if HUB_ID.fullmatch(str(dataset)) and path.suffix not in SUFFIXES:
        repo, _, split = str(dataset).partition(":")
        return _hub_files(repo, split or None)
    raise DataError(
        f"--dataset {dataset}: no such file or directory, and no id of the Hub ('owner/name' or 'owner/name:split')"
    )


def choose_files(names: Iterable[str], split: str | None, where: str) -> list[str]:
    """The files of one split, sorted, all of one folder and of one kind. Raises DataError, naming what there is."""
    data = sorted(name for name in names if _is_data(name))
    if not data:
        _refuse(where, f"holds no file that ends in {', '.join(SUFFIXES)}")
    folder, _, wanted = (split or DEFAULT_SPLIT).rpartition("/")
    inside = [name for name in data if not folder or name.startswith(f"{folder}/")]
    found = [name for name in inside if _has_word(name, wanted, r"\w")]
    found = found or _only_stem([name for name in inside if _has_word(name, wanted, r"[^\W_]")])
    if not found and split is None:
        found = data if len(data) == 1 else []
    if not found:
        _refuse(where, f"has no split {split or DEFAULT_SPLIT!r}; its files are {_some(data)}")
    folders = sorted({_config_of(name, wanted) for name in found})
    if len(folders) > 1:
        choices = [f"{folder}/{wanted}" if folder else wanted for folder in folders]
        _refuse(where, f"has {len(folders)} sets of that split; add one of them after a colon: {_some(choices)}")
    kind = min((SUFFIXES.index(_suffix(name)), _suffix(name)) for name in found)[1]
    return [name for name in found if _suffix(name) == kind]


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name.lower().endswith(SUFFIXES) and not NOT_DATA.match(path.name)


def _suffix(name: str) -> str:
    return next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix))


def _has_word(name: str, word: str, letter: str) -> bool:
    """Whether a word stands in a path, where no `letter` is before or behind it."""
    return re.search(rf"(?<!{letter}){re.escape(word)}(?!{letter})", name) is not None


def _only_stem(names: list[str]) -> list[str]:
    """These names, or none where they are several things ('train_sft-0', 'train_gen-0') and not parts of one."""
    return names if len({re.split(r"[-.]\d|\.", PurePosixPath(name).name)[0] for name in names}) == 1 else []


def _config_of(name: str, split: str) -> str:
    """The folder of a file, without the one that is only named after the split, or holds all data ('data/train-0')."""
    parts = PurePosixPath(name).parent.parts
    return "/".join(part for part in parts if part not in (split, "data"))


def _hub_files(repo: str, split: str | None) -> DatasetFiles:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi().dataset_info(repo)
        names = [sibling.rfilename for sibling in info.siblings or []]
        commit = info.sha
    except OfflineModeIsEnabled:
        directory = _cached(snapshot_download, repo)
        names = [file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()]
        commit = directory.name
    except HFValidationError as e:
        raise DataError(f"--dataset {repo} is no local file, and no id of the Hub: {e}") from e
    except Exception as e:  # also its HTTP library's own, which is another in every one of its versions
        raise DataError(f"--dataset {repo} is no local file, and the Hub did not give it: {_first_line(e)}") from e

    def fetch(name: str) -> Path:
        try:
            # not by the commit: then the cache would not know which one 'main' is, and nothing be found offline
            path = Path(hf_hub_download(repo, name, repo_type="dataset"))
        except Exception as e:
            raise DataError(f"{repo}: the Hub did not give {name}: {_first_line(e)}") from e
        if str(commit) not in path.parts:
            raise DataError(f"{repo} changed while it was downloaded: run it again")
        return path

    chosen = choose_files(names, split, repo)
    return DatasetFiles(chosen, fetch, f"{repo}{':' + split if split else ''} at {str(commit)[:8]}")


def _cached(snapshot_download: Callable[..., str], repo: str) -> Path:
    """What an earlier run downloaded, where HF_HUB_OFFLINE says that nothing more will be."""
    try:
        return Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
    except OSError as e:
        raise DataError(f"--dataset {repo}: HF_HUB_OFFLINE is set, and nothing of it is in the cache") from e


def _refuse(where: str, problem: str) -> NoReturn:
    raise DataError(f"the data set {where} {problem}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
