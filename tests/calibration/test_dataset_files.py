"""Which files a data set's name means: a split of a directory, or of a Hub repository, as `datasets` has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import fake_hub

from octavo.calibration.text.dataset_files import find_dataset
from octavo.calibration.text.documents import DataError

CONFIGS = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/part-*}
  - {split: held_out, path: en/last.jsonl}
- config_name: fr
  data_files: fr/*
---
"""


def lay_out(directory: Path, *names: str, readme: str | None = None) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}')
    if readme is not None:
        (directory / "README.md").write_text(readme)
    return directory


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["alpaca_data.json"], ["alpaca_data.json"]),
        (["train.jsonl", "test.jsonl", "requirements.txt", "LICENSE.txt"], ["train.jsonl"]),
        (["my_train.jsonl", "my_test.jsonl"], ["my_train.jsonl"]),
        (["train/1.jsonl", "train/0.jsonl", "test/0.jsonl"], ["train/0.jsonl", "train/1.jsonl"]),
        (["train-1.jsonl.gz", "train-0.jsonl.gz"], ["train-0.jsonl.gz", "train-1.jsonl.gz"]),
        (["data/train-0.parquet", ".cache/train.jsonl"], ["data/train-0.parquet"]),
        (["deep/train-0.jsonl", "deep/train-1.jsonl", "deep/test.jsonl"], ["deep/train-0.jsonl", "deep/train-1.jsonl"]),
        (["a.csv", "b.csv"], ["a.csv", "b.csv"]),
    ],
)
def test_files_of_a_directory(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    files = find_dataset(str(lay_out(tmp_path, *names)))
    assert files.names == expected
    assert files.fetch(expected[0]) == tmp_path / expected[0]
    assert files.label == tmp_path.name


def test_files_outside_of_a_data_set_are_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "secret.jsonl")
    readme = "---\nconfigs:\n- {config_name: x, data_files: ../secret.jsonl}\n---\n"
    with pytest.raises(DataError, match=r"takes files from elsewhere, such as .*secret\.jsonl"):
        find_dataset(lay_out(tmp_path / "data", "a.jsonl", readme=readme))


def test_a_file_is_itself(tmp_path: Path) -> None:
    file = find_dataset(lay_out(tmp_path, "test.jsonl", "train.jsonl") / "test.jsonl")
    assert (file.names, file.fetch("test.jsonl")) == (["test.jsonl"], tmp_path / "test.jsonl")


@pytest.mark.parametrize(
    ("names", "readme", "message"),
    [
        (["model.bin"], None, r"can't be used: No \(supported\) data files found"),
        (
            ["data/train_gen-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"],
            None,
            r"has no split 'train'; there are .*:train_gen, .*:train_sft",  # which one is not for us to say
        ),
        (
            ["en/part-0.jsonl", "en/last.jsonl", "fr/0.jsonl"],
            CONFIGS,
            r"pick one among the available configs: \['en', 'fr'\]; add it",
        ),
        (["a.jsonl"], "---\nconfigs: {\n---\n", "can't be used"),
        (["a.bin"], CONFIGS, "can't be used: Unable to find '.*/en/[^']*'$"),
    ],
)
def test_what_is_not_clear_is_asked_for(tmp_path: Path, names: list[str], readme: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_dataset(lay_out(tmp_path, *names, readme=readme))


@pytest.mark.parametrize("name", ["nowhere", "/no/such/file", "data/missing.jsonl", "a/b/c", "owner/name:"])
def test_what_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="no such file or directory, and no id of the Hub"):
        find_dataset(name)


FILES = {
    "README.md": CONFIGS.encode(),
    "en/part-0.jsonl": b'{"text": "one"}\n',
    "en/part-1.jsonl": b'{"text": "two"}\n',
    "en/last.jsonl": b'{"text": "last"}\n',
    "fr/0.jsonl": b'{"text": "un"}\n',
}


PROGRAM = """
import sys
from octavo.calibration.text.dataset_files import find_dataset
from octavo.calibration.text.documents import DataError
for spec in sys.argv[1:]:
    try:
        files = find_dataset(spec)
        print(files.label, *(files.fetch(name).read_text().strip() for name in files.names), sep="|")
    except DataError as e:
        print(e)
"""


def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    """Against a server on this machine: downloaded once, then out of the cache without one."""

    def run(*specs: str, **environment: str) -> list[str]:
        """What is said of each, by a process of its own: the Hub's address is read once a process."""
        command = [sys.executable, "-W", "error", "-c", PROGRAM, *specs]
        env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint} | environment
        source = Path(__file__).parents[2] / "src"
        done = subprocess.run(command, env=env, cwd=source, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    with fake_hub("/datasets/owner/name", FILES) as endpoint:
        splits = ("owner/name:en/train", "owner/name:en/held_out", "owner/name", "owner/name:en/test", "other/name")
        train, held_out, whole, test, other = run(*splits)
    both = '{"text": "one"}|{"text": "two"}'
    assert train == f"owner/name:en/train at 01234567|{both}"
    assert held_out == 'owner/name:en/held_out at 01234567|{"text": "last"}'
    assert "pick one among the available configs: ['en', 'fr']; add it after a colon" in whole
    assert "has no split 'test'; there are owner/name:en/train, owner/name:en/held_out" in test
    assert "other/name is no local file, and the Hub did not give it: Client error '404" in other
    train, other = run("owner/name:en/train", "other/name", HF_HUB_OFFLINE="1")
    assert train == f"owner/name:en/train at 01234567|{both}"
    assert "HF_HUB_OFFLINE is set, and nothing of it is in the cache" in other
    (whole,) = run("owner/name")  # nobody listens
    assert "owner/name is no local file, and the Hub did not give it" in whole
