"""Files of text as sequences of documents, of which only those that are asked for are in memory.

.txt, .jsonl and .json are read here: a file is checked when it is opened, to its last line, and an error names the line
that is wrong, also where none of the chosen documents stands on it. The `datasets` library reads .parquet and .csv; a
row's record is checked when it is chosen. All but .parquet may be compressed with gzip (.gz).
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
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
SUFFIXES = (*PLAIN_SUFFIXES, *(suffix + PACKED for suffix in PLAIN_SUFFIXES), ".csv", ".csv" + PACKED, ".parquet")

SECTION = 8192  # bytes of a .txt file that make a document: it ends at the next blank line
PIECE = 32_768  # bytes of a .txt file that are looked at together at most, and so the longest line of a section
MAX_LINE = 256 << 20  # bytes; a longer line is no record but a file of another kind
BOM = b"\xef\xbb\xbf"


class DataError(ValueError):
    """Calibration data that can't be used; the message says what is wrong, where, and what would work."""


class NoTextError(DataError):
    """No data was given, and the model can't write any."""


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


class Rows:
    """The rows of a parquet or csv file, which `datasets` converts to a file in its cache and maps into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kind = "parquet" if path.name.lower().endswith(".parquet") else "csv"
        try:
            columns = _parquet_columns(path) if kind == "parquet" else _csv_columns(path)
            _parse(dict.fromkeys(columns), self.place(0))  # no known column: say so before all is read
            with quiet_datasets() as datasets:
                options = _parquet_options(columns) if kind == "parquet" else _csv_options(columns, datasets)
                self._rows: Any = datasets.load_dataset(
                    kind,
                    data_files=str(path),
                    split="train",
                    download_mode="force_redownload",  # its cache knows a file by its name and time alone
                    **options,
                )
        except DataError:
            raise
        except Exception as e:  # of pyarrow and pandas, which `datasets` wraps
            reason = str(e.__cause__ or e).strip().partition("\n")[0] or type(e).__name__
            raise DataError(f"{path} can't be read as {kind}: {reason}") from e

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        return _parse(self._rows[index], self.place(index))

    def place(self, index: int) -> str:
        return f"{self._path}: row {index + 1}"


def _parquet_columns(path: Path) -> list[str]:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    return list(parquet.read_schema(path).names)


def _parquet_options(columns: list[str]) -> dict[str, Any]:
    """Only the known columns; and not all of the file in memory at once, which a look ahead would have."""
    parquet: Any = importlib.import_module("pyarrow.dataset")
    known = [name for name in KNOWN_KEYS if name in columns]
    return {"columns": known, "fragment_scan_options": parquet.ParquetFragmentScanOptions(pre_buffer=False)}


def _csv_options(columns: list[str], datasets: Any) -> dict[str, Any]:
    """Every cell is text as it stands."""
    texts = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": texts, "keep_default_na": False}


def _csv_columns(path: Path) -> list[str]:
    """The names in the first row, after a look at all of the file for bytes that are not UTF-8."""
    with ExitStack() as stack:
        file: BinaryIO = stack.enter_context(path.open("rb"))
        if path.name.lower().endswith(PACKED):
            file = _unpacked(file, path, stack)
        for _ in _text_pieces(file, path):
            pass
        file.seek(0)
        text = stack.enter_context(io.TextIOWrapper(file, "utf-8-sig", newline=""))
        return next(csv.reader(text), [])


@contextmanager
def quiet_datasets() -> Iterator[Any]:
    """The `datasets` library, without its progress bars and its log of errors, which are raised too."""
    datasets: Any = importlib.import_module("datasets")  # takes a second, and few need it
    verbosity = datasets.logging.get_verbosity()
    had_bars = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


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


def open_file(path: Path, stack: ExitStack) -> Documents:
    """The documents of a file, which is open until `stack` closes.

    Raises DataError, and OSError for what isn't there.
    """
    name = path.name.lower().removesuffix(PACKED)
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path} is of no kind that can be read; files that end in {', '.join(SUFFIXES)} are")
    if name.endswith((".parquet", ".csv")):
        return Rows(path)
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
        return msgspec.json.decode(raw.decode())  # msgspec's own refusal of bytes differs by its version
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
