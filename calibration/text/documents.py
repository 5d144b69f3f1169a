"""Files of text as sequences of documents, of which only those that are asked for are in memory.

.txt, .jsonl, .json (each also .gz) and, where pyarrow is installed, .parquet. A file is checked when it is opened, to
its last line, and what is wrong is named with the line that it stands on: a download that broke off is found even
if none of the lines that were chosen is the broken one. (Parquet has marks of its own for that; its rows are looked
at when they are asked for.)
"""

from __future__ import annotations

import gzip
import importlib
import shutil
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import msgspec

from octavo.calibration.text.records import KNOWN_KEYS, Document, RecordError, parse_record

PACKED = ".gz"
PLAIN_SUFFIXES = (".jsonl", ".json", ".txt")
SUFFIXES = (*PLAIN_SUFFIXES, *(suffix + PACKED for suffix in PLAIN_SUFFIXES), ".parquet")

SECTION = 8192  # bytes of a .txt file that make a document: it ends at the next blank line
PIECE = 32_768  # bytes of a .txt file that are looked at together at most, and so the longest line of a section
MAX_LINE = 256 << 20  # bytes; a longer line is no record but a file of another kind
BOM = b"\xef\xbb\xbf"


class DataError(ValueError):
    """Calibration data that can't be used; the message says what is wrong, where, and what would work."""


class Documents(Protocol):
    """Documents by number, and where each of them stands, for messages."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...

    def place(self, index: int) -> str:
        """Such as 'data.jsonl:17'."""
        ...


class RecordList:
    """Records that are in memory already: a list of a .json file, or a caller's own."""

    def __init__(self, records: Sequence[object], name: str) -> None:
        self._name = name
        self._documents: list[tuple[int, Document]] = []
        for i, record in enumerate(records):
            document = _parse(record, f"{name}: entry {i + 1}")
            if not document.is_empty:
                self._documents.append((i, document))

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index][1]

    def place(self, index: int) -> str:
        return f"{self._name}: entry {self._documents[index][0] + 1}"


class JsonLines:
    """One JSON object a line; blank lines and empty documents don't count."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._offsets = array("Q")
        self._numbers = array("Q")
        offset = number = 0
        file.seek(0)
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise DataError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB: this is not JSON lines")
            if line.strip() and not self._parse(line, offset, number).is_empty:
                self._offsets.append(offset)
                self._numbers.append(number)
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Document:
        offset = self._offsets[index]
        self._file.seek(offset)
        return self._parse(self._file.readline(), offset, self._numbers[index])

    def place(self, index: int) -> str:
        return f"{self._path}:{self._numbers[index]}"

    def _parse(self, line: bytes, offset: int, number: int) -> Document:
        place = f"{self._path}:{number}"
        raw = line.rstrip(b"\r\n")
        return _parse(_decode_json(raw.removeprefix(BOM) if offset == 0 else raw, place), place)


class TextSections:
    """A plain text, cut at blank lines into sections of SECTION bytes or somewhat more, in the file's order."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._begins = array("Q")
        self._lines = array("Q")
        begin = begin_line = end = 0
        holds_text = False
        for offset, number, piece in _text_pieces(file, path):
            if end == begin:
                begin = offset
                begin_line = number
            end = offset + len(piece)
            is_blank = not piece.strip()
            holds_text |= not is_blank
            if (is_blank and end - begin >= SECTION) or end - begin >= PIECE:
                self._add(begin, begin_line, holds_text)
                begin = end
                holds_text = False
        if end > begin:
            self._add(begin, begin_line, holds_text)
        self._end = end

    def _add(self, begin: int, line: int, holds_text: bool) -> None:
        if holds_text:
            self._begins.append(begin)
            self._lines.append(line)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Document:
        begin = self._begins[index]
        end = self._begins[index + 1] if index + 1 < len(self._begins) else self._end
        self._file.seek(begin)
        return Document(self._file.read(end - begin).decode("utf-8-sig" if begin == 0 else "utf-8"))

    def place(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"


class ParquetRows:
    """A row each, of the columns that are known; the table of these columns is in memory."""

    def __init__(self, path: Path) -> None:
        try:
            parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise DataError(
                f"{path} is a parquet file, which takes pyarrow to read, and that is not installed: pip install "
                f"pyarrow, or give a data set in {', '.join(PLAIN_SUFFIXES)}"
            ) from None
        self._path = path
        try:
            columns = parquet.read_schema(path).names
            known = [name for name in KNOWN_KEYS if name in columns]
            # without a known column all are read, one row of them, for the message about their names
            self._table: Any = parquet.read_table(path, columns=known or None)
        except (OSError, ValueError) as e:  # pyarrow's own errors are among them
            raise DataError(f"{path} can't be read as parquet: {e}") from e

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Document:
        return _parse(self._table.slice(index, 1).to_pylist()[0], self.place(index))

    def place(self, index: int) -> str:
        return f"{self._path}: row {index + 1}"


class Joined:
    """The documents of several files, one file after the other."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = parts
        self._ends: list[int] = []
        for part in parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(part))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        part, inner = self._find(index)
        return part[inner]

    def place(self, index: int) -> str:
        part, inner = self._find(index)
        return part.place(inner)

    def _find(self, index: int) -> tuple[Documents, int]:
        which = bisect_right(self._ends, index)
        return self._parts[which], index - (self._ends[which - 1] if which else 0)


@contextmanager
def open_documents(paths: Sequence[Path]) -> Iterator[Documents]:
    """The documents of these files, which stay open meanwhile. Raises DataError, and OSError for what isn't there."""
    with ExitStack() as stack:
        yield Joined([_open(path, stack) for path in paths])


def _open(path: Path, stack: ExitStack) -> Documents:
    name = path.name.lower().removesuffix(PACKED)
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path} is of no kind that can be read; files that end in {', '.join(SUFFIXES)} are")
    if name.endswith(".parquet"):
        return ParquetRows(path)
    file: BinaryIO = stack.enter_context(path.open("rb"))
    if path.name.lower().endswith(PACKED):
        file = _unpacked(file, path, stack)
    if name.endswith(".txt"):
        return TextSections(file, path)
    if name.endswith(".json") and _begins_a_list(file):
        file.seek(0)
        return RecordList(_decode_json(file.read().removeprefix(BOM), str(path)), str(path))
    return JsonLines(file, path)


def _unpacked(file: BinaryIO, path: Path, stack: ExitStack) -> BinaryIO:
    """A temporary file, since documents are read in any order."""
    plain = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))  # noqa: SIM115 (the stack closes it)
    try:
        with gzip.open(file) as packed:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{path} is broken, or no gzip file: {e}") from e
    plain.seek(0)
    return plain


def _begins_a_list(file: BinaryIO) -> bool:
    file.seek(0)
    begin = file.read(1024).removeprefix(BOM).lstrip()
    return begin.startswith(b"[")


def _parse(record: object, place: str) -> Document:
    try:
        return parse_record(record)
    except RecordError as e:
        raise DataError(f"{place}: {e}") from None


def _decode_json(raw: bytes, place: str) -> Any:
    try:
        return msgspec.json.decode(raw)
    except UnicodeDecodeError as e:
        raise DataError(f"{place}: not UTF-8: {e.reason} (0x{e.object[e.start]:02x})") from e
    except RecursionError:
        raise DataError(f"{place}: nested too deeply") from None
    except msgspec.MsgspecError as e:
        # a pretty-printed object fails on its first line
        raise DataError(f"{place}: {e}; needed is one JSON object a line, or in a .json file a list of them") from e


def _text_pieces(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(offset, number of the line, bytes) of each line, or of PIECE bytes of a long one; all checked to be UTF-8."""
    offset = 0
    number = 1
    file.seek(0)
    while piece := file.readline(PIECE):
        if len(piece) == PIECE and not piece.endswith(b"\n"):
            piece = _whole_characters(piece)
            file.seek(offset + len(piece))
        try:
            piece.decode()
        except UnicodeDecodeError as e:
            bad = piece[e.start]
            raise DataError(
                f"{path}:{number}: byte {offset + e.start} (0x{bad:02x}) is not UTF-8: convert the file first"
            ) from e
        yield offset, number, piece
        offset += len(piece)
        number += piece.endswith(b"\n")


def _whole_characters(piece: bytes) -> bytes:
    """Without the bytes of a last character that isn't complete."""
    for back in range(1, 5):
        byte = piece[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character says how long it is
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return piece if back >= length else piece[:-back]
    return piece  # no character at all: decoding says so
