"""The text side of an encoder-decoder: what its decoder begins an answer with, read from the model's config files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.quant.model_files import read_object_if_any
from octavo.runtime.source_messages import AnswerRules, TextSource


@dataclass(frozen=True)
class EncoderText:
    """What requests are made with.

    max_tokens  that the encoder reads of a prompt
    start_id    what the decoder begins with
    first_id    what an answer's first token must be, and last_id the one that max_tokens ends it with; None: any
    """

    max_tokens: int
    start_id: int
    first_id: int | None = None
    last_id: int | None = None

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
    )


def _token(files: list[dict[str, Any]], key: str, vocab_size: int, directory: Path) -> int | None:
    """The id that the first of the files which has this key names, or the first one of a list."""
    given: Mapping[str, Any] = next((file for file in files if file.get(key) is not None), {})
    named = given.get(key)
    token = named[0] if isinstance(named, list) and named else named
    if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
        raise ValueError(f"{directory}: {key} {named!r} is no token id below {vocab_size}")
    return token
