"""Traces: requests that somebody else's service got, from files in the formats that are published.

    sharegpt   JSON, a list of {"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", ...}, ...]}
    mooncake   JSON lines of timestamp in ms, input_length, output_length and hash_ids of blocks of 512 tokens
               (github.com/kvcache-ai/Mooncake); two requests with the same id have the same tokens up to there
    timed      the same with seconds, hash_ids optional: vLLM's timed_trace, guidellm's trace_synthetic
    azure      CSV of TIMESTAMP, ContextTokens, GeneratedTokens (github.com/Azure/AzurePublicDataset)
    burstgpt   CSV of Timestamp in seconds, Request tokens, Response tokens (github.com/HPMLL/BurstGPT)
    prompts    JSON lines or CSV with a text under "prompt", and the answer's tokens under "output_tokens" or
               "output_tokens_count" where they say so: vLLM's custom data set and guidellm's files
    text       a prompt a line, in a file whose name ends in .txt

A file may be compressed by gzip. `read_trace` gives rows, and `trace_prompts` makes prompts of them: where a trace has
no text, random words of as many tokens as the row says, and the same words for the same block. Where a row says that
its answer had 0 tokens, one is asked for, the least that servers give.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from octavo.bench.prompts import FIRST, Filler, Prompt, PromptError, Vocabulary

MOONCAKE_BLOCK = 512
MAX_FIELD = 1 << 30  # characters of a CSV's field; the csv module takes 131,072, and prompts are longer
OUTPUT_KEYS = ("output_tokens", "output_tokens_count", "output_len")


@dataclass(frozen=True)
class Row:
    """One request of a trace: what the file says of it, None for what it doesn't.

    arrival  seconds on the trace's own clock      texts    a conversation up to this request, the user's message last
    blocks   ids of the prompt's blocks            answer   the text that was answered
    follows  it is the next turn of the row before it
    """

    arrival: float | None = None
    input_len: int | None = None
    output_len: int | None = None
    blocks: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    answer: str = ""
    follows: bool = False


@dataclass(frozen=True)
class Trace:
    """Rows in the order of their arrival, and the name of the file's format."""

    format: str
    rows: list[Row]

    @property
    def timed(self) -> bool:
        """True if every request has a time, but those that follow another."""
        return all(row.arrival is not None or row.follows for row in self.rows)


def read_trace(path: Path, kind: str = "auto", seconds_per_unit: float | None = None) -> Trace:
    """Read a file in one of FORMATS, or in the one that it looks like. Raises PromptError with the line.

    seconds_per_unit: of the timestamps, where it isn't what the format says.
    """
    try:
        with _opened(path) as file:
            lines = file.readlines()
    except (EOFError, zlib.error, UnicodeDecodeError) as e:
        raise PromptError(f"{path} can't be read as text: {e}") from e
    if kind == "auto":
        kind = _looks_like(path, lines)
    try:
        rows = list(FORMATS[kind](path, lines))
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        if isinstance(e, PromptError):
            raise
        reason = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise PromptError(f"{path} is not a trace in the format {kind!r}: {reason}") from e
    if not rows:
        raise PromptError(f"{path} has no requests")
    trace = Trace(kind, rows)
    if trace.timed:
        rows = _from_zero(rows, seconds_per_unit or SECONDS.get(kind, 1.0))
    return Trace(kind, rows)


def _opened(path: Path) -> TextIO:
    opened = gzip.open if path.suffix == ".gz" else open
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig", newline=""))


def _looks_like(path: Path, lines: Sequence[str]) -> str:
    """The format of a file by its beginning."""
    if path.suffix in (".txt", ".text"):
        return "text"
    head = next((line.strip() for line in lines if line.strip()), "")
    if head.startswith("["):
        return "sharegpt"
    if not head.startswith("{"):
        columns = {column.strip().lower() for column in head.split(",")}
        known = {"contexttokens": "azure", "request tokens": "burstgpt", "input_length": "timed", "prompt": "prompts"}
        if found := next((kind for column, kind in known.items() if column in columns), None):
            return found
        raise PromptError(f"{path} begins like none of {', '.join(FORMATS)}; --trace-format names one")
    row = _object(head, f"{path}:1")
    if "conversations" in row:
        return "sharegpt"
    if "input_length" in row:
        return "mooncake" if row.get("hash_ids") and isinstance(row.get("timestamp"), int) else "timed"
    if "prompt" in row:
        return "prompts"
    raise PromptError(f"{path}: its first line has neither input_length nor prompt nor conversations")


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise PromptError(f"{place}: not JSON: {e}") from e
    if not isinstance(row, dict):
        raise PromptError(f"{place}: not a JSON object")
    return row


def _objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _object(line, place)


def _rows(path: Path, lines: Sequence[str]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The rows of JSON lines, or of a CSV file, and where each stands."""
    if next((line for line in lines if line.strip()), "").lstrip().startswith("{"):
        return _objects(path, lines)
    return _table(path, lines)


def _table(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a CSV file, and where each ends."""
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(lines)
    for row in reader:
        yield f"{path}:{reader.line_num}", row


@contextmanager
def _request_at(place: str, *names: str) -> Iterator[None]:
    """Whatever is wrong with the values of these names is a PromptError with its place."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        reason = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise PromptError(f"{place}: not a request with {', '.join(names)}: {reason}") from e


def _arrived(arrival: float, input_len: int, output_len: int, blocks: tuple[int, ...] = ()) -> Row:
    """A row that has a time and lengths. Raises ValueError for those that can't be."""
    if not math.isfinite(arrival):
        raise ValueError(f"{arrival} is no time")
    if input_len < 0 or output_len < 0:
        raise ValueError(f"{min(input_len, output_len)} is no number of tokens")
    return Row(arrival, input_len, output_len, blocks)


def _timed(path: Path, lines: Sequence[str]) -> Iterator[Row]:
    for place, row in _rows(path, lines):
        with _request_at(place, "timestamp", "input_length", "output_length"):
            blocks = _blocks(row.get("hash_ids"))
            found = _arrived(float(row["timestamp"]), int(row["input_length"]), int(row["output_length"]), blocks)
        yield found


def _blocks(found: Any) -> tuple[int, ...]:
    """The hash_ids of a JSON line, or of a CSV's field, where they are a list's text."""
    ids = json.loads(found) if isinstance(found, str) and found else found or ()
    if not isinstance(ids, list | tuple) or not all(isinstance(one, int) for one in ids):
        raise ValueError(f"hash_ids {found!r} are not whole numbers in a list")
    return tuple(ids)


def _sharegpt(path: Path, lines: Sequence[str]) -> Iterator[Row]:
    text = "".join(lines)
    conversations = json.loads(text) if text.lstrip().startswith("[") else [row for _, row in _objects(path, lines)]
    for conversation in conversations:
        texts = [str(message["value"]) for message in conversation["conversations"]]
        speakers = [str(message["from"]) for message in conversation["conversations"]]
        if speakers and speakers[0] in ("system", "gpt", "chatgpt", "bing", "bard"):
            texts = texts[1:]
        for i in range(0, len(texts) - 1, 2):
            yield Row(texts=tuple(texts[: i + 1]), answer=texts[i + 1], follows=i > 0)


def _azure(path: Path, lines: Sequence[str]) -> Iterator[Row]:
    for place, row in _table(path, lines):
        with _request_at(place, "TIMESTAMP", "ContextTokens", "GeneratedTokens"):
            # seven digits of a second, where datetime takes six
            stamp = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC)
            found = _arrived(stamp.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        yield found


def _burstgpt(path: Path, lines: Sequence[str]) -> Iterator[Row]:
    for place, row in _table(path, lines):
        with _request_at(place, "Timestamp", "Request tokens", "Response tokens"):
            found = _arrived(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))
        if found.output_len:  # 0 is a request that failed
            yield found


def _prompts(path: Path, lines: Sequence[str]) -> Iterator[Row]:
    for place, row in _rows(path, lines):
        if not isinstance(row.get("prompt"), str):
            raise PromptError(f'{place}: not an object with a text under "prompt"')
        answer = next((row[key] for key in OUTPUT_KEYS if row.get(key) not in (None, "")), None)
        with _request_at(place, "prompt", "a number of output tokens"):
            length = None if answer is None else _arrived(0, 0, int(answer)).output_len
        yield Row(texts=(row["prompt"],), output_len=length)


def _text(_: Path, lines: Sequence[str]) -> Iterator[Row]:
    for line in lines:
        if line.strip():
            yield Row(texts=(line.strip(),))


FORMATS: dict[str, Callable[[Path, Sequence[str]], Iterable[Row]]] = {
    "sharegpt": _sharegpt,
    "mooncake": _timed,
    "timed": _timed,
    "azure": _azure,
    "burstgpt": _burstgpt,
    "prompts": _prompts,
    "text": _text,
}
SECONDS = {"mooncake": 1e-3}  # a unit of the timestamps, where it is not a second


def _from_zero(rows: Sequence[Row], unit: float) -> list[Row]:
    """The rows in the order of their arrival, which counts from the first one."""
    ordered = sorted(rows, key=lambda row: row.arrival or 0.0)
    first = ordered[0].arrival or 0.0
    return [replace(row, arrival=((row.arrival or 0.0) - first) * unit) for row in ordered]


def trace_prompts(
    rows: Sequence[Row],
    vocabulary: Vocabulary,
    rng: random.Random,
    *,
    output_len: int,
    block_size: int = MOONCAKE_BLOCK,
) -> list[Prompt]:
    """A prompt for each row; `output_len` is for rows that don't say theirs.

    What doesn't fit into the server's context is cut (`Prompt.cut`), as in workloads.py. Rows with texts are asked as
    they stand, and the number of their tokens is not known.
    """
    writer = _Writer(vocabulary, rng, block_size)
    prompts = []
    for row in rows:
        answer = output_len if row.output_len is None else max(row.output_len, 1)
        if row.texts:
            last = row.texts[-1]
            prompts.append(Prompt(last, row.input_len, answer, history=row.texts[:-1], follows=row.follows))
        else:
            prompts.append(writer.prompt(row, answer))
    return prompts


class _Writer:
    """Prompts of random words for rows without texts."""

    def __init__(self, vocabulary: Vocabulary, rng: random.Random, block_size: int) -> None:
        self._vocabulary = vocabulary
        self._block_size = block_size
        self._seed = rng.getrandbits(64)
        self._filler = Filler(vocabulary, rng)
        self._known: dict[tuple[int, int], list[str]] = {}

    def prompt(self, row: Row, answer: int) -> Prompt:
        fits, answer, cut = self._vocabulary.fitting(row.input_len or 1, answer)
        room = fits - self._vocabulary.base
        words, used = self._filler.beginning(self._shared(row.blocks), room)
        own, taken = self._filler.words(room - used)
        tokens = self._vocabulary.base + used + taken
        text = " ".join((FIRST, *words, *own))
        return Prompt(text, tokens if self._vocabulary.exact else None, answer, arrival=row.arrival, cut=cut)

    def _shared(self, blocks: Sequence[int]) -> Iterator[str]:
        """The words of the blocks. What base counts is in the first one."""
        for i, block in enumerate(blocks):
            size = max(self._block_size - self._vocabulary.base, 0) if i == 0 else self._block_size
            yield from self._block(block, size)

    def _block(self, block: int, size: int) -> list[str]:
        if (block, size) not in self._known:
            rng = random.Random(f"{self._seed}:{block}")
            self._known[block, size] = self._filler.drawing_from(rng).words(size)[0]
        return self._known[block, size]
