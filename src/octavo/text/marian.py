"""MarianMT's tokenizer: SentencePiece of the source's language and of the target's, and ids by vocab.json for both.

No tokenizer.json says that: a piece's id has nothing to do with its place in either model. Pieces that vocab.json
doesn't have are the unknown token; a text that a SentencePiece model has no piece for counts as one piece, which
vocab.json may have. A language code such as `>>fra<<` in front of a text is one token.

Source: transformers, `tokenization_marian.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models

from octavo.quant.model_files import read_object
from octavo.quant.printable import shown
from octavo.text.sentencepiece_file import SPACE, SentencePieceError, SentencePieces

SOURCE = "source.spm"
TARGET = "target.spm"
VOCABULARY = "vocab.json"
NAMED = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}  # where tokenizer_config.json has none


@dataclass(frozen=True)
class TwoLanguages:
    """Texts to ids. ids: by a piece's text. source, target: whose tokens are pieces."""

    ids: dict[str, int]
    unknown: int
    end: int
    source: Tokenizer
    target: Tokenizer

    def encode(self, text: str, *, add_special_tokens: bool, is_answer: bool) -> list[int]:
        """is_answer: the text is in the target's language."""
        found = []
        if text.startswith(">>") and (end := text.find("<<")) != -1:
            found.append(text[: end + 2])
            text = text[end + 2 :]
        backend = self.target if is_answer else self.source
        found += backend.encode_batch([text], add_special_tokens=False)[0].tokens
        ids = [self.ids.get(piece, self.unknown) for piece in found]
        return [*ids, self.end] if add_special_tokens else ids


def is_marian(directory: Path) -> bool:
    """Whether a checkpoint has such a tokenizer."""
    return all((directory / name).exists() for name in (SOURCE, TARGET, VOCABULARY))


def read_marian(directory: Path, config: dict[str, Any]) -> tuple[Tokenizer, TwoLanguages, dict[str, Any]]:
    """What turns ids into text, what turns texts into ids, and tokenizer_config.json with what it leaves out.

    Raises SentencePieceError, CheckpointError.
    """
    if config.get("separate_vocabs"):
        raise SentencePieceError("separate_vocabs: two vocabularies, of source and target, aren't read; one of both is")
    ids = _ids(read_object(directory / VOCABULARY))
    special = {name: _content(config.get(name), usual) for name, usual in NAMED.items()}
    for name in ("eos_token", "unk_token"):
        if special[name] not in ids:
            raise SentencePieceError(f"{VOCABULARY} has no {shown(special[name])}, which is {name}")
    marks = [AddedToken(text, special=True, normalized=False) for text in special.values() if text in ids]
    source, target = (SentencePieces.read(directory / name).tokenizer() for name in (SOURCE, TARGET))
    for backend in (source, target):
        backend.add_special_tokens(marks)
    named = ids[special["unk_token"]], ids[special["eos_token"]]
    known = {name: text for name, text in special.items() if text in ids}
    return _decoder(ids, marks), TwoLanguages(ids, *named, source, target), known | config


def _ids(given: dict[str, Any]) -> dict[str, int]:
    """vocab.json: each piece's id, from 0 on."""
    for piece, token in given.items():
        if type(token) is not int or not 0 <= token < 2 * len(given):
            raise SentencePieceError(f"{VOCABULARY}: {shown(piece)} has the id {shown(token)}; one from 0 on works")
    if len(set(given.values())) < len(given):
        raise SentencePieceError(f"{VOCABULARY}: two pieces have one id")
    return given


def _content(given: Any, usual: str) -> str:
    """A special token's text, of which `Tokenizer.open` checks that it is one."""
    text = given.get("content") if isinstance(given, dict) else given
    return text if isinstance(text, str) else usual


def _decoder(ids: dict[str, int], marks: list[AddedToken]) -> Tokenizer:
    """Whose tokens are vocab.json's, at their places; an unused id is a token of no text."""
    by_id = {token: piece for piece, token in ids.items()}
    pieces = [(by_id.get(token, f"\0{token}"), 0.0) for token in range(max(by_id) + 1)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.decoder = decoders.Metaspace(SPACE)
    backend.add_special_tokens(marks)
    return backend
