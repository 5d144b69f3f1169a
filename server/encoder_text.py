"""The text side of an encoder-decoder: what its decoder begins an answer with, read from the model's config files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.quant.model_files import read_object_if_any
from octavo.quant.printable import shown
from octavo.runtime.source_messages import AnswerRules, TextSource


@dataclass(frozen=True)
class EncoderText:
    """What requests are made with.

    max_tokens  that the encoder reads of a prompt
    start_id    what the decoder begins with
    first_id    what an answer's first token must be, and last_id the one that max_tokens ends it with; None: any
    forbidden   sequences of tokens that no answer may have: MarianMT's padding, whose logit is as good as others'
    """

    max_tokens: int
    start_id: int
    first_id: int | None = None
    last_id: int | None = None
    forbidden: tuple[tuple[int, ...], ...] = ()

    def rules(self, begin: list[int]) -> AnswerRules | None:
        """What an answer keeps to, behind what the decoder begins with: a first token of the client's own stays."""
        starts = ((self.first_id,),) if self.first_id is not None and len(begin) == 1 else ()
        return AnswerRules(starts, last_id=self.last_id) if starts or self.last_id is not None else None


def read_encoder_text(directory: Path, source: TextSource, vocab_size: int) -> EncoderText:
    """As generation_config.json says, or else config.json. Raises ValueError where neither names a beginning."""
    files = [read_object_if_any(directory / name) for name in ("generation_config.json", "config.json")]
    start = _token(files, "decoder_start_token_id", vocab_size, directory)
    start = _token(files, "bos_token_id", vocab_size, directory) if start is None else start
    if start is None:
        raise ValueError(
            f"{directory}: neither generation_config.json nor config.json has a decoder_start_token_id, with which an "
            "encoder-decoder begins to write"
        )
    return EncoderText(
        source.positions,
        start,
        _token(files, "forced_bos_token_id", vocab_size, directory),
        _token(files, "forced_eos_token_id", vocab_size, directory),
        _forbidden(files, vocab_size, directory),
    )


def _forbidden(files: list[dict[str, Any]], vocab_size: int, directory: Path) -> tuple[tuple[int, ...], ...]:
    """The sequences of bad_words_ids; the end of an answer alone is none, as in transformers."""
    given = _given(files, "bad_words_ids")
    if given is None:
        return ()
    listed = given if isinstance(given, list) and all(isinstance(word, list) and word for word in given) else [[None]]
    if any(type(token) is not int or not 0 <= token < vocab_size for word in listed for token in word):
        raise ValueError(f"{directory}: bad_words_ids {shown(given)} is no list of lists of ids below {vocab_size}")
    ends = _given(files, "eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(tuple(word) for word in listed if not (len(word) == 1 and word[0] in ends))


def _token(files: list[dict[str, Any]], key: str, vocab_size: int, directory: Path) -> int | None:
    """The id that the first of the files which has this key names, or the first one of a list."""
    named = _given(files, key)
    token = named[0] if isinstance(named, list) and named else named
    if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
        raise ValueError(f"{directory}: {key} {named!r} is no token id below {vocab_size}")
    return token


def _given(files: list[dict[str, Any]], key: str) -> Any:
    """What the first of the files which has this key says; None where none has it."""
    return next((file[key] for file in files if file.get(key) is not None), None)
