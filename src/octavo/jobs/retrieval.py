"""Data sets of retrieval: documents, queries, and which documents answer them. Built in, or in BEIR's layout."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import octavo.calibration
from octavo.calibration.verify import held_out_text

FEWEST_WORDS = 20  # of a built-in passage; a sentence or two
BUILT_IN = "octavo's held-out questions"
JUDGED = "qrels/test.tsv"
MOST = 2**31  # of a judgment's grade, either way

Place = Path | zipfile.Path


class RetrievalError(ValueError):
    """A data set that can't be used; the message is one line."""


@dataclass(frozen=True)
class Retrieval:
    """documents, queries: texts by id. relevance: of each query the documents that answer it, with grades above 0.

    depth  candidates of a query among which a reranker chooses
    notes  what is odd about it
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    relevance: dict[str, dict[str, int]]
    depth: int
    notes: tuple[str, ...] = ()


def built_in_retrieval() -> Retrieval:
    """Questions that were written about the held-out text in other words, each answered by one of its passages."""
    passages = _passages(held_out_text())
    file = Path(octavo.calibration.__file__).with_name("held_out_questions.tsv")
    queries = {}
    relevance = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines()):
        question, answer = line.split("\t")
        (place,) = [place for place, passage in enumerate(passages) if answer in passage]
        queries[f"q{number}"] = question
        relevance[f"q{number}"] = {f"d{place}": 1}
    return Retrieval(BUILT_IN, {f"d{i}": text for i, text in enumerate(passages)}, queries, relevance, 20)


def _passages(text: str) -> list[str]:
    """Sentences of a paragraph, as many as make FEWEST_WORDS words; what is left of it belongs to the last passage."""
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        begin = len(found)
        sentences: list[str] = []
        for sentence in re.split(r"(?<=[.!?\"])\s+(?=[A-Z0-9\"])", paragraph.strip()):
            sentences.append(sentence)
            if len(" ".join(sentences).split()) >= FEWEST_WORDS:
                found.append(" ".join(sentences))
                sentences = []
        if sentences and len(found) > begin:
            found[-1] = " ".join([found[-1], *sentences])
        elif len(" ".join(sentences).split()) > 8:  # fewer are a heading's
            found.append(" ".join(sentences))
    return found


def read_retrieval(path: Path) -> Retrieval:
    """A directory or a .zip with corpus.jsonl, queries.jsonl and qrels/test.tsv, or the .tsv file of other judgments.

    Raises RetrievalError, which names the file and the line.
    """
    try:
        root, judged = _places(path)
        relevance = _relevance(judged)
        queries = _texts(root / "queries.jsonl", lambda row: row.get("text"), only=relevance)
        documents = _texts(root / "corpus.jsonl", lambda row: _with_title(row.get("title"), row.get("text")))
    except OSError as error:
        raise RetrievalError(f"{path} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RetrievalError(f"{path}: a file is not UTF-8: {error.reason}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise RetrievalError(f"{path} is no zip file that can be read: {error}") from None
    unknown = next((query for query in relevance if query not in queries), None)
    if unknown is not None:
        raise RetrievalError(f"{judged}: the query {unknown[:80]!r} is not in queries.jsonl")
    if not documents:
        raise RetrievalError(f"{root / 'corpus.jsonl'} has no documents")
    answered = {query: grades for query, grades in relevance.items() if grades}
    if not answered:
        raise RetrievalError(f"{judged}: no query has a document that answers it, with a score above 0")
    notes = []
    if len(answered) < len(relevance):
        notes.append(f"{len(relevance) - len(answered)} queries that no document answers are left out")
    missing = sum(document not in documents for grades in answered.values() for document in grades)
    if missing:
        notes.append(f"{missing} judgments name documents that corpus.jsonl lacks, which nothing can find")
    name = path.stem if path == judged or path.suffix == ".zip" else path.resolve().name
    return Retrieval(name, documents, {query: queries[query] for query in answered}, answered, 100, tuple(notes))


def _places(path: Path) -> tuple[Place, Place]:
    """Where corpus and queries are, and the judgments."""
    if path.suffix == ".tsv":
        return (path.parent.parent if path.parent.name == "qrels" else path.parent), path
    root: Place = path
    if path.suffix == ".zip":
        root = zipfile.Path(path)
        inside = [one for one in root.iterdir() if one.is_dir() and (one / "corpus.jsonl").exists()]
        root = inside[0] if len(inside) == 1 else root
    for name in ("corpus.jsonl", "queries.jsonl", JUDGED):
        if not (root / name).is_file():
            raise RetrievalError(
                f"--dataset {path} has no {name}; a directory or a .zip with corpus.jsonl, queries.jsonl and {JUDGED}, "
                "as BEIR's are, or the .tsv file of other judgments works"
            )
    return root, root / JUDGED


def _relevance(file: Place) -> dict[str, dict[str, int]]:
    """Of each query the grades above 0; the first line of the file names its columns."""
    found: dict[str, dict[str, int]] = {}
    for number, line in _lines(file):
        cells = line.split("\t")
        if number == 1 and cells[-1].strip() == "score":
            continue
        if len(cells) != 3:
            raise RetrievalError(
                f"{file}, line {number}: {len(cells)} columns; query-id, corpus-id and score, with tabs between, work"
            )
        query, document, score = (cell.strip() for cell in cells)
        try:
            grade = int(score)
        except ValueError:
            raise RetrievalError(f"{file}, line {number}: the score {score[:40]!r} is no whole number") from None
        if abs(grade) >= MOST:
            raise RetrievalError(f"{file}, line {number}: the score {score[:40]} is too large")
        grades = found.setdefault(query, {})
        if document in grades and grades[document] != grade:
            raise RetrievalError(f"{file}, line {number}: two scores for {query[:80]!r} and {document[:80]!r}")
        grades[document] = grade
    return {query: {name: grade for name, grade in grades.items() if grade > 0} for query, grades in found.items()}


def _texts(
    file: Place, text_of: Callable[[dict[str, Any]], object], only: dict[str, dict[str, int]] | None = None
) -> dict[str, str]:
    """Texts by _id, of those ids only where `only` has some."""
    found: dict[str, str] = {}
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise RetrievalError(f"{file}, line {number} is no JSON") from None
        name = row.get("_id") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise RetrievalError(f"{file}, line {number}: no _id that is a string")
        if only is not None and name not in only:
            continue
        text = text_of(row)
        if not isinstance(text, str):
            raise RetrievalError(f"{file}, line {number}: {name[:80]!r} has no text that is a string")
        if name in found:
            raise RetrievalError(f"{file}, line {number}: the _id {name[:80]!r} is there twice")
        found[name] = text
    return found


def _with_title(title: object, text: object) -> object:
    """As BEIR reads a document: its title, a space, its text."""
    if not isinstance(text, str) or not isinstance(title, str | None):
        return None
    return f"{title} {text}".strip() if title else text.strip()


def _lines(file: Place) -> Iterator[tuple[int, str]]:
    """The lines that aren't blank, with their numbers."""
    with file.open("r", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")
