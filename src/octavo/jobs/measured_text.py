"""The text that a model's quality is measured on, as token ids: a text in windows, or pairs of prompts and answers.

Pairs are what an encoder-decoder is measured on: its encoder reads the one, and its decoder is asked for the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.calibration.verify import HELD_OUT, held_out_text, windows
from octavo.quant.checkpoint import read_config
from octavo.quant.model_files import parse_json
from octavo.quant.printable import shown
from octavo.runtime.model.families.registry import ENCODER_DECODERS
from octavo.runtime.source_messages import TextSource

if TYPE_CHECKING:
    from octavo.jobs.model_text import ModelText

PAIR = ("prompt", "completion")


class QualityError(RuntimeError):
    """Quality can't be measured here; the message says why. That says nothing against the checkpoint."""


@dataclass(frozen=True)
class Window:
    """Tokens [T] to be predicted, each behind those before it. source: what an encoder reads; None: there is none."""

    token_ids: Tensor
    source: Tensor | None = None


@dataclass(frozen=True)
class MeasuredText:
    """name: where it is from. token_ids: all that is predicted, prefix: the tokens before each window (BOS, if any).

    pairs  what the encoder reads, and what the decoder does, its start first; empty: it is one text
    """

    name: str
    token_ids: list[int]
    prefix: list[int]
    pairs: tuple[tuple[list[int], list[int]], ...] = ()

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest source, and of the longest answer."""
        sources, answers = zip(*self.pairs, strict=True)
        return max(map(len, sources)), max(map(len, answers))

    def windows(self, length: int) -> list[Window]:
        """length: tokens of a window of a text; a pair is one of its own."""
        if self.pairs:
            return [Window(torch.tensor(answer), torch.tensor(source)) for source, answer in self.pairs]
        return [Window(token_ids) for token_ids in windows(self.token_ids, length, self.prefix)]


def reads_pairs(directory: Path) -> bool:
    """Whether a model is measured on pairs."""
    return read_config(directory).get("model_type") in ENCODER_DECODERS


def measured_text(directory: Path, text: Path | None, max_tokens: int) -> MeasuredText:
    """Of a file, or the built-in held-out text: so much of it as has max_tokens tokens. Raises QualityError."""
    from octavo.calibration.text.documents import DataError
    from octavo.jobs.model_text import ModelText

    try:
        model_text = ModelText(directory)
        found = (_pairs if reads_pairs(directory) else _text)(directory, text, max_tokens, model_text)
    except DataError as e:
        raise QualityError(str(e)) from e
    if len(found.token_ids) < 2:
        raise QualityError(f"{found.name} has {len(found.token_ids)} tokens; 2 are the fewest that say anything")
    if max(found.token_ids) >= model_text.vocab_size:
        raise QualityError(
            f"the tokenizer gives token {max(found.token_ids)}, and the model has {model_text.vocab_size}"
        )
    return found


def _text(directory: Path, text: Path | None, max_tokens: int, model_text: ModelText) -> MeasuredText:  # noqa: ARG001
    source = HELD_OUT if text is None else text.name
    content = held_out_text() if text is None else _read_text(text, model_text)
    plain, framed = (model_text.encode("a", add_special_tokens=special) for special in (False, True))
    token_ids = _encode(model_text, content, max_tokens)
    return MeasuredText(source, token_ids, framed[: framed.index(plain[0])])


def _pairs(directory: Path, text: Path | None, max_tokens: int, model_text: ModelText) -> MeasuredText:
    from octavo.server.encoder_text import read_encoder_text

    if text is None:
        raise QualityError(
            f"{directory.name} is an encoder-decoder, which is measured on answers to prompts: --data FILE.jsonl, each "
            f'line an object with "{PAIR[0]}" and "{PAIR[1]}"'
        )
    try:
        start = read_encoder_text(directory, TextSource(1, 1), model_text.vocab_size).start_id
    except ValueError as e:
        raise QualityError(str(e)) from e
    pairs: list[tuple[list[int], list[int]]] = []
    predicted: list[int] = []
    for prompt, answer in _read_pairs(text):
        pairs.append((model_text.encode(prompt), [start, *model_text.encode(answer, is_answer=True)]))
        predicted += pairs[-1][1][1:]
        if len(predicted) >= max_tokens:
            break
    return MeasuredText(text.name, predicted, [], tuple(pairs))


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    """The pairs of a .jsonl file."""
    if path.suffix.lower() != ".jsonl":
        raise QualityError(f"{path}: pairs are read from a .jsonl file")
    found = []
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record: Any = parse_json(line)
        except ValueError as e:
            raise QualityError(f"{path}:{number} is not JSON: {e}") from None
        texts = [record.get(key) if isinstance(record, dict) else None for key in PAIR]
        if not all(isinstance(each, str) and each for each in texts):
            raise QualityError(f"{path}:{number}: {shown(record)} is no object with the texts {' and '.join(PAIR)}")
        found.append((str(texts[0]), str(texts[1])))
    if not found:
        raise QualityError(f"{path} has no pair")
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise QualityError for a file that can't be read as text."""
    try:
        yield
    except OSError as e:
        raise QualityError(f"the text {path} can't be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise QualityError(f"the text {path} is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}") from e


def _utf8(path: Path) -> str:
    with _reading(path):
        return path.read_text("utf-8")


def _read_text(path: Path, model_text: ModelText) -> str:
    """A text file as it is, or a data set's documents (.jsonl, .json, .csv, .parquet, .gz) joined by blank lines."""
    from octavo.calibration.text.data import ConversationError
    from octavo.calibration.text.documents import SUFFIXES, DataError, open_file

    if path.suffix.lower() == ".txt" or not path.name.lower().endswith(SUFFIXES):
        return _utf8(path)
    try:
        with _reading(path), ExitStack() as stack:
            documents = open_file(path, stack)
            found = [documents[i] for i in range(len(documents))]
        return "\n\n".join(d.text if d.text is not None else model_text.render(d.messages) for d in found)
    except ConversationError as e:
        raise DataError(f"{path} has conversations: {e}") from e


def _encode(model_text: ModelText, text: str, max_tokens: int) -> list[int]:
    """The first max_tokens tokens of a text; no more of a large file is tokenized than they take."""
    length = 32 * max_tokens
    while True:
        token_ids = model_text.encode(text[:length], add_special_tokens=False)
        if length >= len(text) or len(token_ids) >= 2 * max_tokens:
            return token_ids[:max_tokens]
        length *= 2
