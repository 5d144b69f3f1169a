"""What a checkpoint's side files say of answers: end tokens and default sampling values, or why they can't be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from octavo_server import TINY, said_at_once

from octavo.server.served_model import end_token_ids, sampling_defaults
from octavo.text.tokenizer import Tokenizer

NO_TOKEN_IDS = ["2", ["a"], -1, True, {}, 10**23, [2, None], 2.0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(TINY)


def write(directory: Path, **files: Any) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_the_first_file_that_names_end_tokens_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def found() -> set[int]:
        return set(end_token_ids(tmp_path, tokenizer)) - {tokenizer.eos_id}

    assert found() == set()
    write(tmp_path, config={"text_config": {"eos_token_id": 11}})
    assert found() == {11}
    write(tmp_path, config={"eos_token_id": [12, 13], "text_config": {"eos_token_id": 11}})
    assert found() == {12, 13}
    write(tmp_path, generation_config={"eos_token_id": 14})
    assert found() == {14}
    write(tmp_path, generation_config={"eos_token_id": None})
    assert found() == set()


@pytest.mark.parametrize("value", NO_TOKEN_IDS)
def test_what_is_no_end_token_is_told_by_file_and_key(tmp_path: Path, tokenizer: Tokenizer, value: object) -> None:
    write(tmp_path, config={"text_config": {"eos_token_id": value}})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/config.json: text_config.eos_token_id is ")):
        end_token_ids(tmp_path, tokenizer)
    write(tmp_path, config={"eos_token_id": value})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/config.json: eos_token_id is ")):
        end_token_ids(tmp_path, tokenizer)
    write(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/generation_config.json: eos_token_id is ")):
        end_token_ids(tmp_path, tokenizer)


def test_default_sampling_values_are_told_by_where_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    write(tmp_path, generation_config={"temperature": "hot", "top_p": 0.5})
    with pytest.raises(ValueError, match=re.escape(f"{file}: temperature: ")):
        sampling_defaults(tmp_path, "auto", {})
    assert sampling_defaults(tmp_path, "vllm", {}) == {}
    assert sampling_defaults(tmp_path, "auto", {"temperature": 0.3}) == {"top_p": 0.5, "temperature": 0.3}
    with pytest.raises(ValueError, match="--override-generation-config: temperature: "):
        sampling_defaults(tmp_path, "vllm", {"temperature": 3})
    for content in ("[]", "{", "\xff"):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=re.escape(str(file))):
            sampling_defaults(tmp_path, "auto", {})


def test_a_server_with_a_wrong_end_token_does_not_start(tmp_path: Path) -> None:
    model = Path(copytree(TINY, tmp_path / "model"))
    write(model, generation_config={"eos_token_id": "2"})
    assert f"{model}/generation_config.json: eos_token_id is '2'" in said_at_once(str(model), "--port", "0")
