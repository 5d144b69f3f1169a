"""Which files a data set's name means: told by names alone, and never guessed between two."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from octavo.calibration.text.dataset_files import choose_files, find_dataset
from octavo.calibration.text.documents import DataError

# File lists as they are on the Hub.
ULTRACHAT = [
    ".gitattributes",
    "README.md",
    "data/test_gen-00000-of-00001-3d4cd8309148a71f.parquet",
    "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet",
    "data/train_gen-00000-of-00003-a6c9fb894be3e50b.parquet",
    "data/train_gen-00001-of-00003-d6a0402e417f35ca.parquet",
    "data/train_sft-00000-of-00003-a3ecf92756993583.parquet",
    "data/train_sft-00001-of-00003-0a1804bcb6ae68c6.parquet",
]
WIKITEXT = [
    "README.md",
    "wikitext-103-raw-v1/train-00000-of-00002.parquet",
    "wikitext-103-raw-v1/test-00000-of-00001.parquet",
    "wikitext-2-raw-v1/train-00000-of-00001.parquet",
    "wikitext-2-raw-v1/test-00000-of-00001.parquet",
]
C4 = [f"en/c4-train.{i:05d}-of-01024.json.gz" for i in range(3)] + [
    "en/c4-validation.00000-of-00008.json.gz",
    "en.noblocklist/c4-train.00000-of-01024.json.gz",
    "realnewslike/c4-train.00000-of-00512.json.gz",
]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (ULTRACHAT, "train_sft", ULTRACHAT[6:8]),
        (ULTRACHAT, "test_gen", ULTRACHAT[2:3]),
        (WIKITEXT, "wikitext-2-raw-v1/train", WIKITEXT[3:4]),
        (C4, "en/train", C4[:3]),
        (C4, "validation", C4[3:4]),
        (["alpaca_data.json"], None, ["alpaca_data.json"]),
        (["README.md", "train.jsonl", "test.jsonl", "requirements.txt", "LICENSE.txt"], None, ["train.jsonl"]),
        (["my_train.jsonl", "my_test.jsonl"], None, ["my_train.jsonl"]),
        (["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"], None, ["train/0.jsonl", "train/1.jsonl"]),
        (["train.parquet", "train.jsonl"], None, ["train.jsonl"]),
        (["train-1.jsonl.gz", "train-0.jsonl.gz"], "train", ["train-0.jsonl.gz", "train-1.jsonl.gz"]),
        (["data/train-0.parquet", ".cache/train.jsonl"], None, ["data/train-0.parquet"]),
    ],
)
def test_files_of_a_split(names: list[str], split: str | None, expected: list[str]) -> None:
    assert choose_files(names, split, "it") == expected


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["README.md", "model.bin"], None, r"it holds no file that ends in \.jsonl"),
        (ULTRACHAT, None, r"has no split 'train'; its files are data/test_gen-00000"),  # sft or gen: not for us to say
        (WIKITEXT, None, r"has 2 sets .*: wikitext-103-raw-v1/train, wikitext-2-raw-v1/train"),
        (C4, "train", r"has 3 sets .*: en/train, en\.noblocklist/train, realnewslike/train"),
        (["a.jsonl", "b.jsonl"], None, r"has no split 'train'; its files are a\.jsonl, b\.jsonl"),
        (["a.jsonl"], "test", r"has no split 'test'; its files are a\.jsonl"),
    ],
)
def test_what_is_not_clear_is_asked_for(names: list[str], split: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_files(names, split, "it")


def test_local_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("deep/train-0.jsonl", "deep/train-1.jsonl", "deep/test.jsonl"):
        (tmp_path / name).write_text("{}")
    file = find_dataset(tmp_path / "deep/test.jsonl")
    assert (file.names, file.fetch("test.jsonl")) == (["test.jsonl"], tmp_path / "deep/test.jsonl")
    directory = find_dataset(str(tmp_path))
    assert directory.names == ["deep/train-0.jsonl", "deep/train-1.jsonl"]
    assert directory.fetch(directory.names[1]) == tmp_path / "deep/train-1.jsonl"


@pytest.mark.parametrize("name", ["nowhere", "/no/such/file", "data/missing.jsonl", "a/b/c", "owner/name:"])
def test_what_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="no such file or directory, and no id of the Hub"):
        find_dataset(name)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as one data set of two small files takes."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    FILES = {  # noqa: RUF012
        "README.md": b"hello",
        "train-00000-of-00002.jsonl": b'{"text": "one"}\n',
        "train-00001-of-00002.jsonl": b'{"text": "two"}\n',
    }

    def do_GET(self) -> None:
        if self.path == "/api/datasets/owner/name":
            siblings = [{"rfilename": name} for name in self.FILES]
            self._answer(json.dumps({"id": "owner/name", "sha": self.COMMIT, "siblings": siblings}).encode())
            return
        content = self.FILES.get(self.path.rpartition("/")[2])
        if not self.path.startswith("/datasets/owner/name/resolve/main/") or content is None:
            self.send_error(404)
            return
        self._answer(content)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


PROGRAM = """
import sys
from octavo.calibration.text.dataset_files import find_dataset
from octavo.calibration.text.documents import DataError
try:
    files = find_dataset(sys.argv[1])
    print(files.label, *(files.fetch(name).read_text().strip() for name in files.names), sep="|")
except DataError as e:
    print(e)
"""


def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    """Against a server on this machine: downloaded once, then out of the cache without one."""

    def run(spec: str, **environment: str) -> str:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, spec]
        env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint} | environment
        source = Path(__file__).parents[2] / "src"
        return subprocess.run(command, env=env, cwd=source, capture_output=True, text=True, check=True).stdout.strip()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            both = '{"text": "one"}|{"text": "two"}'
            assert run("owner/name") == f"owner/name at 01234567|{both}"
            assert run("owner/name:train") == f"owner/name:train at 01234567|{both}"
            assert "has no split 'test'; its files are train-00000" in run("owner/name:test")
            assert "other/name is no local file, and the Hub did not give it: Client error '404" in run("other/name")
        finally:
            server.shutdown()
            thread.join()
    assert run("owner/name", HF_HUB_OFFLINE="1") == f"owner/name at 01234567|{both}"
    assert "HF_HUB_OFFLINE is set, and nothing of it is in the cache" in run("other/name", HF_HUB_OFFLINE="1")
    assert "owner/name is no local file, and the Hub did not give it" in run("owner/name")  # nobody listens
