"""Files of text as documents: each kind is read, and whatever is wrong is named with its line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from octavo.calibration.text import documents as module
from octavo.calibration.text.documents import DataError, Documents, Joined, open_file


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def open_documents(paths: Sequence[Path]) -> Iterator[Documents]:
    with ExitStack() as stack:
        yield Joined([open_file(path, stack) for path in paths])


def texts(*paths: Path) -> list[str | None]:
    with open_documents(paths) as documents:
        return [documents[i].text for i in range(len(documents))]


def places(*paths: Path) -> list[str]:
    with open_documents(paths) as documents:
        return [documents.place(i) for i in range(len(documents))]


def lines(*values: str) -> str:
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def test_json_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "\ufeff" + lines("eins", "zwei") + "\n" + lines("", "drei ☃").rstrip("\n"))
    assert texts(file) == ["eins", "zwei", "drei ☃"]
    assert places(file) == [f"{file}:1", f"{file}:2", f"{file}:5"]


def test_a_json_file_is_a_list_or_lines(tmp_path: Path) -> None:
    listed = write(tmp_path / "list.json", json.dumps([{"text": "a"}, {"text": ""}, {"text": "b"}], indent=2))
    assert texts(listed) == ["a", "b"]
    assert places(listed) == [f"{listed}: entry 1", f"{listed}: entry 3"]
    assert texts(write(tmp_path / "lines.json", lines("a", "b"))) == ["a", "b"]


def test_a_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 300 + "\n" + "ünd " * 300 + "\n\n"
    content = "\ufeff" + paragraph * 20
    file = write(tmp_path / "a.txt", content)
    sections = [text for text in texts(file) if text is not None]
    assert "".join(sections) == content.removeprefix("\ufeff")
    assert all(section.startswith("word") and section.endswith("\n\n") for section in sections)
    assert all(module.SECTION <= len(s.encode()) < module.SECTION + len(paragraph.encode()) for s in sections[:-1])
    assert places(file)[:2] == [f"{file}:1", f"{file}:{1 + sections[0].count(chr(10))}"]


@pytest.mark.parametrize("shift", range(4))
def test_a_long_line_is_cut_between_characters(tmp_path: Path, shift: int) -> None:
    content = "a" * shift + "🙂" * (module.PIECE // 2) + "é" * module.PIECE
    assert "".join(text or "" for text in texts(write(tmp_path / "a.txt", content))) == content


def test_a_text_without_text_has_no_documents(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "")) == []
    assert texts(write(tmp_path / "b.txt", " \n\n" * module.SECTION)) == []
    assert texts(write(tmp_path / "c.jsonl", "\n\n" + lines(""))) == []


def test_gzip(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl.gz", gzip.compress(lines("a", "b").encode()))) == ["a", "b"]
    assert texts(write(tmp_path / "a.json.gz", gzip.compress(b'[{"text": "a"}]'))) == ["a"]
    assert texts(write(tmp_path / "a.txt.gz", gzip.compress(b"hello"))) == ["hello"]
    whole = gzip.compress(lines("a" * 1000).encode())
    for broken in (whole[:-9], b"no gzip", whole[:20] + b"\0" * 40):
        with pytest.raises(DataError, match=r"b\.jsonl\.gz is broken, or no gzip file"):
            texts(write(tmp_path / "b.jsonl.gz", broken))


def test_several_files_are_one(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", lines(*values)) for i, values in enumerate([["a", "b"], [], ["c"]])]
    assert texts(*paths) == ["a", "b", "c"]
    assert places(*paths) == [f"{paths[0]}:1", f"{paths[0]}:2", f"{paths[2]}:1"]


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        (b'{"text": "broken off', r"a\.jsonl:2: .*truncated; needed is one JSON object a line"),
        (b"hello", r"a\.jsonl:2: JSON is malformed"),
        (b'{"text": 3}', r'a\.jsonl:2: "text" is int, not a string'),
        (b'["text"]', r"a\.jsonl:2: list is not an object"),
        (b'{"body": "x"}', r"a\.jsonl:2: the keys are 'body'; needed is one of"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8: invalid start byte \(0xff\)"),
        (b"[" * 100_000, r"a\.jsonl:2: nested too deeply"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: "),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, second_line: bytes, message: str) -> None:
    content = lines("a").encode() + second_line + b"\n" + lines("b").encode()
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / "a.jsonl", content))


def test_a_pretty_printed_object_is_told_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json:1: .*or in a \.json file a list of them"):
        texts(write(tmp_path / "a.json", json.dumps({"data": [{"text": "a"}]}, indent=2)))
    with pytest.raises(DataError, match=r"b\.json: .*truncated"):
        texts(write(tmp_path / "b.json", '[{"text": "a"},'))
    with pytest.raises(DataError, match=r"c\.json: entry 2: the keys are 'x'"):
        texts(write(tmp_path / "c.json", '[{"text": "a"}, {"x": 1}]'))


def test_bad_utf8_in_a_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt:3: byte 8 \(0xe9\) is not UTF-8: convert the file first"):
        texts(write(tmp_path / "a.txt", b"ab\ncd\nfg" + "é".encode("latin-1") + b"\n"))
    with pytest.raises(DataError, match=r"b\.txt:1: byte 0 \(0xff\) is not UTF-8"):
        texts(write(tmp_path / "b.txt", "hello".encode("utf-16")))
    with pytest.raises(DataError, match=r"c\.txt:1: byte 32767 \(0x80\)"):  # a PIECE ends amid no character
        texts(write(tmp_path / "c.txt", b"a" * (module.PIECE - 1) + b"\x80" * 9))


def test_huge_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "word " * 1_000_000
    file = write(tmp_path / "a.jsonl", lines("a", long, "b"))
    assert texts(file) == ["a", long, "b"]
    monkeypatch.setattr(module, "MAX_LINE", 1 << 20)
    with pytest.raises(DataError, match=r"a\.jsonl:2: a line of more than 1 MiB: this is not JSON lines"):
        texts(file)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tsv is of no kind that can be read; files that end in \.jsonl, \.json"):
        texts(write(tmp_path / "a.tsv", "a,b"))
    with pytest.raises(OSError, match=r"nowhere\.jsonl"):
        texts(tmp_path / "nowhere.jsonl")


def test_parquet(tmp_path: Path) -> None:
    """Only the known columns of a table are read, and a row is named where it is wrong."""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    table = pyarrow.table({"prompt": ["x", "y"], "messages": [messages, []], "blob": [b"\xff", b""]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    with open_documents([tmp_path / "a.parquet"]) as documents:
        assert [documents[i].messages for i in range(len(documents))] == [tuple(messages), ()]
        assert documents.place(1) == f"{tmp_path / 'a.parquet'}: row 2"
    parquet.write_table(pyarrow.table({"text": ["a", None, ""]}), tmp_path / "b.parquet")
    with open_documents([tmp_path / "b.parquet"]) as documents:
        assert [documents[i].is_empty for i in range(len(documents))] == [False, True, True]
    parquet.write_table(pyarrow.table({"messages": ["a"]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r'e\.parquet: row 1: "messages" is str, not a list of messages'):
        texts(tmp_path / "e.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: row 1: the keys are 'body'; needed is one of"):
        texts(tmp_path / "c.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for broken in (b"", b"hello", whole[: len(whole) // 2], whole[:100] + b"\0" * 40 + whole[140:]):
        with pytest.raises(DataError, match=r"d\.parquet can't be read as parquet"):
            texts(write(tmp_path / "d.parquet", broken))


def test_csv(tmp_path: Path) -> None:
    """Every cell is text as it stands: numbers, an empty cell and what other readers take for no value."""
    content = '\ufefftext,id\n"a, ""b""\nc",1\n12,2\nNA,\n"",4\n'
    expected = ['a, "b"\nc', "12", "NA", ""]
    assert texts(write(tmp_path / "a.csv", content)) == expected
    assert places(tmp_path / "a.csv")[2] == f"{tmp_path / 'a.csv'}: row 3"
    assert texts(write(tmp_path / "a.csv.gz", gzip.compress(content.encode()))) == expected
    turns = write(tmp_path / "b.csv", "instruction,output\nSay hello.,Hello!\n")
    assert texts(turns) == ["Say hello.\n\nHello!"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.csv: row 1: the keys are none"),
        (b"body\nx\n", "a.csv: row 1: the keys are 'body'; needed is one of"),
        (b"text,id\na,1\nb,2,3\n", "a.csv can't be read as csv: .*Expected 2 fields in line 3, saw 3"),
        (b"text\na\n\xe9\n", r"a.csv:3: byte 7 \(0xe9\) is not UTF-8"),
    ],
)
def test_a_csv_that_is_wrong_is_told_where(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / "a.csv", content))


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text\nbefore\n")
    time = file.stat()
    assert texts(file) == ["before"]
    os.utime(write(file, "text\nbehind\n"), ns=(time.st_atime_ns, time.st_mtime_ns))
    assert texts(file) == ["behind"]
