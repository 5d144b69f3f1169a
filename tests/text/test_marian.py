"""MarianMT's tokenizer against what transformers' MarianTokenizer says of the same files, with SentencePiece itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from octavo.text.detokenizer import IncrementalDecoder
from octavo.text.tokenizer import Tokenizer, TokenizerError

MADE = Path(__file__).parent.parent / "fixtures" / "marian"
EXPECTED = json.loads((MADE / "expected.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(MADE)


@pytest.mark.parametrize("case", EXPECTED, ids=[repr(case["text"]) for case in EXPECTED])
def test_ids_are_those_of_transformers(case: dict[str, object], tokenizer: Tokenizer) -> None:
    """Of a text that is read, with the end behind it or without, and of one that is written; and back to text."""
    text = str(case["text"])
    assert tokenizer.encode(text) == case["ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == case["plain"]
    answer = tokenizer.encode(text, is_answer=True)
    assert answer == case["answer"]
    said = tokenizer.decode(answer, skip_special_tokens=True)
    assert said.strip() == case["decoded"]
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(decoder.push([token]) for token in answer) == said


def test_special_tokens_are_the_usual_ones_where_no_config_names_them(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    ids = json.loads((MADE / "vocab.json").read_text())
    assert tokenizer.special_ids == {ids[name] for name in ("</s>", "<unk>", "<pad>")}
    assert tokenizer.num_tokens == len(ids)
    assert tokenizer.eos_id == ids["</s>"]


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + _varint(number >> 7)


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


SOURCE = (MADE / "source.spm").read_bytes()
BROKEN = [
    (SOURCE[:-3], "no whole SentencePiece model"),
    (b"{}", "wire type"),
    (b"\x0a" + b"\xff" * 12, "a number has no end"),
    (b"\x0a\xff\xff\xff\xff\x7f", "no whole SentencePiece model"),
    (b"", "none of its 0 pieces is the unknown one"),
    (SOURCE + _field(2, _field(3, 2)), "its model_type is bpe; unigram is read"),
    (SOURCE + _field(2, _field(35, 1)), "it has byte_fallback"),
    (SOURCE + _field(3, _field(5, 0)), "doesn't escape_whitespaces"),
    (SOURCE + _field(3, _field(2, b"\xff\xff\xff\xffx")), "its map of characters"),
    (SOURCE + _field(3, _field(2, b"\4\0\0\0\0\xff\xff\xff")), "its map of characters is damaged: its trie of 1 units"),
    (SOURCE + _field(1, _field(1, b"\xff")), "no whole SentencePiece model"),
    (SOURCE + _field(1, _field(1, b"x") + _field(3, 4)), "'x', is found whatever its score"),
    (SOURCE + _field(1, _field(1, b"x") + _varint(2 << 3 | 5) + b"\x00\x00\xc0\x7f"), "has the score nan"),
    (SOURCE + _field(1, 7), "a message is a number"),
]


@pytest.mark.parametrize(("content", "why"), BROKEN)
def test_a_file_that_is_no_such_model_is_refused_by_name(content: bytes, why: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    shutil.copytree(MADE, made)
    (made / "source.spm").write_bytes(content)
    with pytest.raises(TokenizerError, match=f"source.spm.*{why}|made: {why}"):
        Tokenizer.open(made)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("vocab.json", {"</s>": 0, "<unk>": 0}, "two pieces have one id"),
        ("vocab.json", {"</s>": 0, "<unk>": 1 << 40}, "<unk>' has the id 1099511627776"),
        ("vocab.json", {"</s>": 0, "<unk>": True}, "<unk>' has the id True"),
        ("vocab.json", {"a": 0}, "no '</s>', which is eos_token"),
        ("tokenizer_config.json", {"separate_vocabs": True}, "separate_vocabs: two vocabularies"),
        ("tokenizer_config.json", {"eos_token": 7}, "eos_token is 7"),
    ],
)
def test_what_a_vocabulary_can_t_be_is_refused(file: str, content: object, why: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    shutil.copytree(MADE, made)
    (made / file).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=why):
        Tokenizer.open(made)


def test_an_unused_id_is_no_text(tmp_path: Path) -> None:
    made = tmp_path / "made"
    shutil.copytree(MADE, made)
    (made / "vocab.json").write_text(json.dumps({"</s>": 0, "<unk>": 1, "▁The": 4}))
    tokenizer = Tokenizer.open(made)
    assert tokenizer.encode("The dog") == [4, 1, 0]
    assert tokenizer.num_tokens == 5
