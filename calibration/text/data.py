"""The calibration set: which tokens a model sees while its layers' inputs are measured.

Documents are shuffled by the seed and packed into windows of one length. Knows token ids and documents; tokenizer and
chat template come from the caller as a TextEncoder, and so does text that the model itself generates.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from octavo.calibration.text.dataset_files import find_dataset
from octavo.calibration.text.documents import DataError, Documents, Joined, RecordList, open_file
from octavo.calibration.text.records import Document, Message

CHARACTERS_PER_TOKEN = 64  # no text has so many: what lies beyond that many for each token wanted is not tokenized
BLANK_LINE = "\n\n"  # between documents, where the tokenizer marks neither begin nor end
OVERLAP = 32  # tokens in a row that two texts don't share by chance


class ConversationError(ValueError):
    """A TextEncoder's chat template doesn't take this conversation."""


class TooFewTokensError(DataError):
    """The data is good, and not enough."""


class TextEncoder(Protocol):
    """A model's tokenizer and chat template. vocab_size: how many token ids the model has."""

    vocab_size: int
    has_chat_template: bool

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with what the tokenizer puts before and behind a text, or without."""
        ...

    def render(self, messages: Sequence[Message]) -> str:
        """A whole conversation through the chat template; raises ConversationError."""
        ...


@dataclass(frozen=True)
class CalibrationData:
    """samples are int64 [max_seq_length] each, as many as were asked for. source and notes are for people."""

    samples: list[Tensor]
    source: str
    seed: int
    notes: tuple[str, ...] = ()
    fingerprint: str = field(init=False)  # of the token ids, so that a resumed run knows that they are the same

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.samples))

    @property
    def num_tokens(self) -> int:
        return sum(sample.numel() for sample in self.samples)


@dataclass(frozen=True)
class Sizes:
    """The number and length of samples, and the seed that chooses them."""

    num_samples: int
    max_seq_length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(f"--num-calibration-samples {self.num_samples}: 1 at least is needed")
        if self.max_seq_length < 2:
            raise DataError(f"--max-seq-length {self.max_seq_length}: 2 at least are needed")


def fingerprint(samples: Sequence[Tensor]) -> str:
    """SHA-256, as hex, of the samples' lengths and token ids, each as 8 bytes, the lowest first."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.numel().to_bytes(8, "little"))
        digest.update(sample.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def from_dataset(dataset: str | Path, encoder: TextEncoder, sizes: Sizes) -> CalibrationData:
    """Out of a file, a directory or a Hub id. Of a data set in many files only as many are read as it takes."""
    files = find_dataset(dataset)
    parts: list[Documents] = []
    with ExitStack() as stack:
        for i, name in enumerate(files.names):
            parts.append(open_file(files.fetch(name), stack))
            label = files.label if len(files.names) == 1 else f"{files.label}, {i + 1} of {len(files.names)} files"
            try:
                return from_documents(Joined(parts), encoder, sizes, label)
            except TooFewTokensError:
                if i + 1 == len(files.names):
                    raise
    raise AssertionError("a data set has one file at least")


def from_records(records: Sequence[object], encoder: TextEncoder, sizes: Sizes) -> CalibrationData:
    """Out of texts, or dicts as a line of a .jsonl file holds them."""
    name = "the records given"
    return from_documents(RecordList(records, name), encoder, sizes, name)


def from_token_ids(samples: Sequence[Tensor], *, vocab_size: int, source: str, seed: int = 0) -> CalibrationData:
    """Token ids [max_seq_length] that the caller made, all of one length."""
    if not samples:
        raise DataError(f"{source}: there is no sample")
    lengths = sorted({sample.numel() for sample in samples})
    if len(lengths) > 1:
        raise DataError(f"{source}: samples have {lengths[0]} to {lengths[-1]} tokens; needed is one length")
    checked = []
    for i, sample in enumerate(samples):
        if sample.ndim != 1 or sample.numel() < 2 or sample.is_floating_point() or sample.is_complex():
            raise DataError(
                f"{source}: sample {i} is {sample.dtype} {list(sample.shape)}; needed are two integers or more, in one "
                "dimension"
            )
        ids = sample.to("cpu", torch.int64)
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise DataError(
                f"{source}: sample {i} has token {worst}, and the model's vocabulary is 0..{vocab_size - 1}"
            )
        checked.append(ids)
    return CalibrationData(checked, source, seed)


def mixed(data: CalibrationData, other: CalibrationData) -> CalibrationData:
    """Both sets' samples, which are of one length, in an order that the first one's seed gives: a part of them that is
    held back has some of each.
    """
    samples = [*data.samples, *other.samples]
    random.Random(data.seed).shuffle(samples)
    return CalibrationData(samples, f"{data.source}; and {other.source}", data.seed, (*data.notes, *other.notes))


def from_documents(documents: Documents, encoder: TextEncoder, sizes: Sizes, source: str) -> CalibrationData:
    """Shuffle, tokenize and pack documents until there are num_samples windows. Raises DataError.

    Each document gives its first max_seq_length tokens, so that many have a part; only when all have been taken, and
    that was too little, come the rest of the longer ones. Every window begins with what the tokenizer puts before a
    text (BOS): a model's first token draws most of the attention, and another one there gives inputs that it never has.
    """
    framing = _Framing.of(encoder)
    length = sizes.max_seq_length
    if length < framing.shortest:
        raise DataError(f"--max-seq-length {length}: {framing.shortest} at least are needed")
    if len(documents) == 0:
        raise DataError(f"{source} holds no text: there is nothing to calibrate on")
    order = list(range(len(documents)))
    random.Random(sizes.seed).shuffle(order)
    stream = _Stream(documents, order, encoder, framing, sizes.num_samples * length)
    samples = list(_pack(stream.pieces(length), framing.prefix, length, sizes.num_samples))
    if len(samples) < sizes.num_samples:
        raise stream.too_few(source, len(samples), sizes)
    what = f"{source}: {len(samples)} samples of {length} tokens, out of {stream.num_taken:,} of {len(order):,}"
    return CalibrationData(samples, f"{what} documents, seed {sizes.seed}", sizes.seed, tuple(stream.notes()))


def check_disjoint(data: CalibrationData, token_ids: Sequence[int], what: str) -> None:
    """Raise DataError when the calibration set holds a part of the text that quality is to be measured on."""
    known = {tuple(token_ids[i : i + OVERLAP]) for i in range(len(token_ids) - OVERLAP + 1)}
    for number, sample in enumerate(data.samples):
        ids = sample.tolist()
        if any(tuple(ids[i : i + OVERLAP]) in known for i in range(len(ids) - OVERLAP + 1)):
            raise DataError(
                f"{data.source}: sample {number} holds a part of {what}, on which quality is measured: figures on text "
                "that a model was calibrated on say too much good of it; take another text"
            )


@dataclass(frozen=True)
class _Framing:
    """The tokens that a tokenizer puts before a text; is_marked: it marks where a text begins or ends."""

    prefix: list[int]
    is_marked: bool

    @property
    def shortest(self) -> int:
        return len(self.prefix) + 2

    @classmethod
    def of(cls, encoder: TextEncoder) -> _Framing:
        plain, framed = (encoder.encode("a", add_special_tokens=special) for special in (False, True))
        if not plain or plain[0] not in framed:
            raise DataError(
                f"the tokenizer makes {framed} of 'a', and without special tokens {plain}: it can't be used"
            )
        return cls(framed[: framed.index(plain[0])], len(framed) > len(plain))


class _Stream:
    """The documents' token ids in the order given, and what is to be told about them."""

    def __init__(
        self, documents: Documents, order: list[int], encoder: TextEncoder, framing: _Framing, num_wanted: int
    ) -> None:
        self._documents = documents
        self._order = order
        self._encoder = encoder
        self._framing = framing
        self._num_wanted = num_wanted
        self.num_taken = 0
        self.num_tokens = 0
        self.refused: list[str] = []

    def pieces(self, first: int) -> Iterator[list[int]]:
        """The first tokens of every document, then the others."""
        rest: list[list[int]] = []
        num_left = 0
        for index in self._order:
            ids = self._token_ids(index)
            if not ids:
                continue
            self.num_taken += 1
            self.num_tokens += len(ids)
            if len(ids) > first and num_left < self._num_wanted:
                rest.append(ids[first:])
                num_left += len(ids) - first
            yield ids[:first]
        yield from rest

    def _token_ids(self, index: int) -> list[int]:
        document = self._documents[index]
        limit = CHARACTERS_PER_TOKEN * self._num_wanted
        try:
            text, special = self._text(document, index)
            ids = self._encoder.encode(text[:limit], add_special_tokens=special)
        except ConversationError as e:
            self.refused.append(f"{self._documents.place(index)}: {e}")
            return []
        except UnicodeEncodeError as e:
            raise DataError(f"{self._documents.place(index)}: half of a surrogate pair is no text: {e}") from e
        if ids and max(ids) >= self._encoder.vocab_size:
            raise DataError(
                f"{self._documents.place(index)}: the tokenizer gives token {max(ids)}, and the model has "
                f"{self._encoder.vocab_size}: it is another model's tokenizer"
            )
        return ids

    def _text(self, document: Document, index: int) -> tuple[str, bool]:
        """The text to tokenize, and whether the tokenizer adds special tokens; a template writes them itself."""
        if document.messages and self._encoder.has_chat_template:
            return self._encoder.render(document.messages), False
        if document.text is None:
            raise DataError(
                f"{self._documents.place(index)} is a conversation, and the model has no chat template: give one with "
                '--chat-template, or data with "text"'
            )
        if not document.text.strip():
            return "", False
        return document.text + ("" if self._framing.is_marked else BLANK_LINE), True

    def notes(self) -> list[str]:
        if not self.refused:
            return []
        count = len(self.refused)
        return [f"{count} conversation{'s' * (count > 1)} left out, first {self.refused[0]}"]

    def too_few(self, source: str, num_found: int, sizes: Sizes) -> TooFewTokensError:
        """The error that says what there is, what is needed, and what would work."""
        shorter = self.num_tokens // sizes.num_samples
        ways = [f"--num-calibration-samples {num_found}"] if num_found else []
        ways += [f"--max-seq-length {shorter}"] if shorter >= self._framing.shortest else []
        notes = "".join(f"; {note}" for note in self.notes())
        found = f"{self.num_taken:,} document{'s' * (self.num_taken != 1)} with {self.num_tokens:,} tokens"
        return TooFewTokensError(
            f"{source}: {found} give {num_found:,} samples of {sizes.max_seq_length:,}, and {sizes.num_samples:,} are "
            f"needed ({self._num_wanted:,} tokens): {' or '.join([*ways, 'more text'])} would work{notes}"
        )


def _pack(pieces: Iterator[list[int]], prefix: list[int], length: int, count: int) -> Iterator[Tensor]:
    """Windows of `length` tokens, `count` at most: each is `prefix` and what comes next, or begins with it already."""
    waiting: list[int] = []
    made = 0
    for piece in pieces:
        waiting += piece
        while len(waiting) >= length:  # with a prefix one token or two may wait needlessly for the next piece
            head = [] if waiting[: len(prefix)] == prefix else prefix
            size = length - len(head)
            yield torch.tensor(head + waiting[:size])
            del waiting[:size]
            made += 1
            if made == count:
                return
    head = [] if waiting[: len(prefix)] == prefix else prefix
    if len(head) + len(waiting) >= length and made < count:
        yield torch.tensor(head + waiting[: length - len(head)])
