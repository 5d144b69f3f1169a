"""The check of SentencePiece's map of characters against the `tokenizers` library, which panics by a damaged one."""

from __future__ import annotations

import base64
import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import normalizers

from octavo.text.charsmap import CharsMapError, check_charsmap
from octavo.text.sentencepiece_file import SentencePieces
from octavo.text.tokenizer import Tokenizer, TokenizerError

FIXTURES = Path(__file__).parent.parent / "fixtures"
MAP = SentencePieces.read(FIXTURES / "marian" / "source.spm").charsmap
CHARACTERS = " ".join(map(chr, range(1, 0x3000)))


def panics(charsmap: bytes) -> bool | None:
    """Whether the library panics at some text; None: it doesn't take the map."""
    try:
        normalizer = normalizers.Precompiled(charsmap)
    except Exception:
        return None
    try:
        normalizer.normalize_str(CHARACTERS)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return True
    return False


def is_refused(charsmap: bytes) -> bool:
    try:
        check_charsmap(charsmap)
    except CharsMapError:
        return True
    return False


def test_no_map_that_is_taken_panics(capfd: pytest.CaptureFixture[str]) -> None:
    """Of 600 damaged ones. The library tells of each panic on stderr itself."""
    assert panics(MAP) is False
    assert not is_refused(MAP)
    drawn = random.Random(1)
    outcomes = []
    for _ in range(600):
        damaged = bytearray(MAP)
        for _ in range(drawn.choice([1, 3, 10])):
            damaged[drawn.randrange(4, len(damaged))] = drawn.randrange(256)
        outcomes.append((panics(bytes(damaged)), is_refused(bytes(damaged))))
    capfd.readouterr()
    assert outcomes.count((True, True)) > 20
    assert outcomes.count((False, False)) > 300  # what is changed where nothing leads is no damage
    assert (True, False) not in outcomes


@pytest.mark.parametrize(
    ("charsmap", "why"),
    [
        (b"", "its trie has 0 bytes, and 0 are there"),
        (MAP[:100], "its trie has 1024 bytes, and 96 are there"),
        (b"\x03\0\0\0abc", "its trie has 3 bytes"),
        (MAP[:4] + b"\0\xff\xff\xff" + MAP[8:], "its trie of 256 units leads to unit"),
        (MAP[:1028], "of its 0 bytes of texts begins none"),
    ],
)
def test_damage_is_told(charsmap: bytes, why: str) -> None:
    with pytest.raises(CharsMapError, match=why):
        check_charsmap(charsmap)


@pytest.mark.parametrize("is_sequence", [False, True])
def test_a_tokenizer_with_a_damaged_map_is_refused(is_sequence: bool, tmp_path: Path) -> None:
    for charsmap in (MAP, MAP[:4] + b"\0\xff\xff\xff" + MAP[8:]):
        step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
        content = json.loads((FIXTURES / "tiny" / "tokenizer.json").read_text())
        content["normalizer"] = {"type": "Sequence", "normalizers": [step]} if is_sequence else step
        shutil.copyfile(FIXTURES / "tiny" / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        if charsmap == MAP:
            assert Tokenizer.open(tmp_path).encode("The cat")
            continue
        with pytest.raises(TokenizerError, match="its map of characters is damaged: its trie of 256 units leads to"):
            Tokenizer.open(tmp_path)
