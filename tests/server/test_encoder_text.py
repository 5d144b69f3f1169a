"""What generation_config.json and config.json say of an encoder-decoder's answers, and values that say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.runtime.source_messages import TextSource
from octavo.server.encoder_text import EncoderText, read_encoder_text


def read(directory: Path, generation: dict[str, object], config: dict[str, object]) -> EncoderText:
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "config.json").write_text(json.dumps(config))
    return read_encoder_text(directory, TextSource(64, 2), 96)


def test_generation_config_counts_before_config(tmp_path: Path) -> None:
    config = {"decoder_start_token_id": 7, "bad_words_ids": [[7]], "eos_token_id": 5}
    assert read(tmp_path, {}, config) == EncoderText(64, 7, forbidden=((7,),))
    given = {"decoder_start_token_id": 9, "bad_words_ids": [[9], [5], [1, 5]], "forced_eos_token_id": 5}
    assert read(tmp_path, given, config) == EncoderText(64, 9, last_id=5, forbidden=((9,), (1, 5)))


@pytest.mark.parametrize("words", [7, [7], [[]], [["a"]], [[96]], [[-1]], [[True]], {"a": [1]}])
def test_bad_words_are_lists_of_token_ids(words: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bad_words_ids .* is no list of lists of ids below 96"):
        read(tmp_path, {"decoder_start_token_id": 7, "bad_words_ids": words}, {})
