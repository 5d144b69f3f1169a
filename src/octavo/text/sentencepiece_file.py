"""A SentencePiece model's file: its pieces, and how it changes a text before it looks for them.

The file is a protocol buffer, sentencepiece_model.proto of google/sentencepiece; of its fields only those that a
tokenizer needs are read. Knows no model and no token id of one: a checkpoint may number the pieces in its own way.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers

from octavo.quant.model_files import ANEW, check_regular
from octavo.quant.printable import shown
from octavo.text.charsmap import CharsMapError, check_charsmap

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM = 1
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_HIDDEN = "\0"  # in front of pieces that are found in no text, which has no such character


class SentencePieceError(ValueError):
    """A file that is no SentencePiece model, or is one of a kind that isn't read; the message says why."""


@dataclass(frozen=True)
class SentencePieces:
    """pieces: text and score of each. unknown: the place of the one that stands for what none of them has.

    charsmap  what characters become, in SentencePiece's own form; empty: they stay
    """

    pieces: list[tuple[str, float]]
    unknown: int
    charsmap: bytes
    adds_space: bool
    removes_spaces: bool

    @classmethod
    def read(cls, file: Path) -> SentencePieces:
        """Raises SentencePieceError, CheckpointError, and FileNotFoundError where there is no such file."""
        check_regular(file)
        try:
            return _parsed(file.read_bytes())
        except (UnicodeDecodeError, IndexError, struct.error):
            raise SentencePieceError(f"{file} is no whole SentencePiece model; {ANEW}") from None
        except SentencePieceError as error:
            raise SentencePieceError(f"{file}: {error}") from None

    def tokenizer(self) -> Tokenizer:
        """Of which a text's tokens are the pieces that SentencePiece finds; what is in none of them is one as it is."""
        backend = Tokenizer(models.Unigram(self.pieces, unk_id=self.unknown, byte_fallback=False))
        steps: list[normalizers.Normalizer] = []
        if self.charsmap:
            try:
                steps.append(normalizers.Precompiled(self.charsmap))
            except Exception as error:  # the library raises nothing narrower
                raise SentencePieceError(f"its map of characters can't be read: {error}") from None
        if self.removes_spaces:
            steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if self.adds_space:
            steps.append(normalizers.Prepend(SPACE))
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
        return backend


def _parsed(data: bytes) -> SentencePieces:
    pieces: list[tuple[str, float]] = []
    unknown: int | None = None
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            text, score, kind = _piece(value)
            if kind in (USER_DEFINED, BYTE):
                what = "found whatever its score" if kind == USER_DEFINED else "a byte"
                raise SentencePieceError(f"piece {len(pieces)}, {shown(text)}, is {what}; only plain pieces are read")
            if kind == UNKNOWN:
                unknown = len(pieces)
            pieces.append((text if kind == NORMAL else f"{_HIDDEN}{text}", score))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    model_type = trainer.get(3, UNIGRAM)
    if model_type != UNIGRAM:
        name = MODEL_TYPES.get(model_type, model_type) if isinstance(model_type, int) else "of no kind"
        raise SentencePieceError(f"its model_type is {name}; unigram is read")
    for field, name in ((24, "treat_whitespace_as_suffix"), (35, "byte_fallback")):
        if trainer.get(field):
            raise SentencePieceError(f"it has {name}, which isn't read")
    if not normalizer.get(5, 1):
        raise SentencePieceError("it doesn't escape_whitespaces, which isn't read")
    if unknown is None:
        raise SentencePieceError(f"none of its {len(pieces)} pieces is the unknown one")
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes):
        raise SentencePieceError("its map of characters is a number")
    if charsmap:
        try:
            check_charsmap(charsmap)
        except CharsMapError as error:
            raise SentencePieceError(f"its map of characters is damaged: {error}; {ANEW}") from None
    return SentencePieces(pieces, unknown, charsmap, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))


def _piece(value: int | bytes) -> tuple[str, float, int]:
    """Text, score and kind."""
    fields = dict(_fields(value))
    text = fields.get(1, b"")
    score = fields.get(2, bytes(4))
    kind = fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise SentencePieceError("a piece has a field of another type")
    [number] = struct.unpack("<f", score)
    if not text or not math.isfinite(number):
        raise SentencePieceError(f"a piece, {shown(text)}, has the score {number}")
    return text.decode(), number, kind


def _fields(data: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbers of a message's fields with their values. Raises IndexError for one that ends too early."""
    if isinstance(data, int):
        raise SentencePieceError("a message is a number")
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case other:
                raise SentencePieceError(f"a field has the wire type {other}: it is no SentencePiece model; {ANEW}")
        if at + size > len(data):
            raise IndexError
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise SentencePieceError(f"a number has no end: it is no SentencePiece model; {ANEW}")
