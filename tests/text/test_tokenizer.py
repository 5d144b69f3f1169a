"""Tokens to text: whole, piece by piece, and cut at stop strings; the oracle is transformers and the whole text."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_encoders import save_tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from octavo.text.detokenizer import Detokenizer, IncrementalDecoder, StopStrings
from octavo.text.tokenizer import EncodingError, Tokenizer, TokenizerError

TINY = Path(__file__).parent.parent / "fixtures" / "tiny"
BYTE_LEVEL = Tokenizer.open(TINY)
SAMPLES = [
    "naïve café",
    "日本語 テキスト",
    "👩\u200d👩\u200d👧 x",
    " two  spaces ",
    "def f():\n\treturn 1",
    "<|im_end|>",
    "\ufffd x",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(SAMPLES)


def _sentencepiece_like() -> Tokenizer:
    """Llama 2's arrangement: a dummy space in front, and <0xNN> tokens for characters outside the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij.,xyé"]
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc"), ("▁", "▁")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True})


SENTENCEPIECE = _sentencepiece_like()


QWEN = Tokenizer.open(TINY.parent / "tiny-qwen2")  # NFC, and a pattern that splits


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE, QWEN], ids=["byte level", "sentencepiece", "NFC"])
@given(text=TEXTS)
def test_no_token_stands_for_more_bytes_than_it_may(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.max_token_bytes is not None
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(text.encode()) <= tokenizer.max_token_bytes * len(ids)


def test_the_longest_token_is_the_limit_where_nothing_is_normalized() -> None:
    assert max(len(BYTE_LEVEL.token_bytes(i)) for i in range(BYTE_LEVEL.num_tokens)) == BYTE_LEVEL.max_token_bytes


def test_nfc_writes_at_most_three_bytes_as_one() -> None:
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000:
            whole = unicodedata.normalize("NFC", chr(code))
            for parts in (chr(code), unicodedata.normalize("NFD", whole)):
                assert len(parts.encode()) <= 3 * len(unicodedata.normalize("NFC", parts).encode())


def _over_all_bytes(**changes: object) -> Tokenizer:
    alphabet = {character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Backend(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(backend, name, value)
    return Tokenizer(backend, {})


def test_without_a_limit_where_a_tokenizer_drops_text() -> None:
    assert _over_all_bytes().max_token_bytes == 4
    removed = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    for changes in (
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Replace("  ", " ")},
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])},
        {"normalizer": normalizers.Replace(Regex(" +"), " ")},
        {"pre_tokenizer": removed},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"model": models.BPE({"a": 0, "[UNK]": 1}, [], unk_token="[UNK]", fuse_unk=True)},
        {"model": models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")},
    ):
        assert _over_all_bytes(**changes).max_token_bytes is None, changes
    greedy = _over_all_bytes()
    greedy._backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    assert Tokenizer(greedy._backend, {}).max_token_bytes is None


def test_a_pattern_that_never_ends_is_an_ordinary_error() -> None:
    """The library panics, which is no Exception."""
    endless = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = _over_all_bytes(pre_tokenizer=pre_tokenizers.Sequence([endless, pre_tokenizers.ByteLevel()]))
    with pytest.raises(EncodingError, match="gives up"):
        tokenizer.encode("a" * 40 + "b")
    with pytest.raises(EncodingError, match="surrogate"):
        tokenizer.encode("\ud800")
    assert tokenizer.encode("aab", add_special_tokens=False)


def _in_pieces(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> str:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    return "".join([decoder.push([token_id]) for token_id in ids] + [decoder.finish()])


@given(st.lists(st.integers(0, 1030), max_size=60), st.booleans())
def test_pieces_of_any_byte_level_tokens_join_to_the_whole_text(ids: list[int], skip: bool) -> None:
    assert _in_pieces(BYTE_LEVEL, ids, skip=skip) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(TEXTS, st.booleans(), st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]))
def test_pieces_of_a_text_join_to_the_text(text: str, skip: bool, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert _in_pieces(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(TEXTS, TEXTS)
def test_a_continuation_is_what_the_whole_text_adds_to_the_prompts(prompt: str, rest: str) -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        ids = tokenizer.encode(prompt + rest, add_special_tokens=False)
        for cut in range(len(ids) + 1):
            before, after = ids[:cut], ids[cut:]
            decoder = IncrementalDecoder(tokenizer, before, skip_special_tokens=False)
            added = "".join([decoder.push([token_id]) for token_id in after] + [decoder.finish()])
            whole = tokenizer.decode(ids)
            assert whole.endswith(added)
            shown = tokenizer.decode(before)
            if not shown.endswith("\ufffd"):  # else the cut is inside a character, which then belongs to the rest
                assert shown + added == whole


def test_invalid_byte_fallback_keeps_the_characters_that_may_have_been_sent() -> None:
    euro = [SENTENCEPIECE.token_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    ids = [*euro, SENTENCEPIECE.token_id("<0xFF>"), SENTENCEPIECE.token_id("a")]
    assert _in_pieces(SENTENCEPIECE, [i for i in ids if i is not None], skip=True) == "€\ufffda"


def test_token_bytes_and_names() -> None:
    ids = BYTE_LEVEL.encode("日")
    assert b"".join(BYTE_LEVEL.token_bytes(i) for i in ids) == "日".encode()
    assert BYTE_LEVEL.token_text(ids[0]).startswith("bytes:\\x")
    assert BYTE_LEVEL.token_text(2) == "<|im_end|>"
    assert BYTE_LEVEL.token_bytes(999_999) == b""


def test_bos_is_added_as_the_config_says() -> None:
    assert SENTENCEPIECE.encode("a")[0] == SENTENCEPIECE.token_id("<s>")
    assert SENTENCEPIECE.encode("a", add_special_tokens=False)[0] != SENTENCEPIECE.token_id("<s>")
    assert SENTENCEPIECE.eos_id == 2


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2", "tiny--llmc-w8a8"])
def test_encoding_and_special_tokens_equal_transformers(fixtures: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer may replace what tokenizer.json says

    theirs = PreTrainedTokenizerFast.from_pretrained(fixtures / name)
    ours = Tokenizer.open(fixtures / name)
    long = "A text of more than 256 tokens: a truncation in tokenizer.json must not cut it. " * 40
    for text in ["", "Hello world", "<|im_start|>user\nhi<|im_end|>", "日本", long]:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.special_tokens == {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    ids = list(range(40))
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.num_tokens == len(theirs)


def test_a_token_only_in_the_config_is_added(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    config = {"eos_token": "<|im_end|>", "bos_token": "<|new|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.encode("a")[0] == tokenizer.token_id("<|new|>") == 1024
    assert 1024 in tokenizer.special_ids


def test_an_unknown_decoder_is_refused_by_name() -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.CTC()
    with pytest.raises(TokenizerError, match="CTC"):
        Tokenizer(backend, {})


def test_pieces_of_words_and_the_tokens_around_texts(tmp_path: Path) -> None:
    backend = save_tokenizer(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    ids = tokenizer.encode("running cats", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode()[tokenizer.strip_left :] == backend.decode(ids)
    assert tokenizer.frame == ([2], [3])
    assert tokenizer.pair_frame == ([2], [3], [3])
    assert tokenizer.pairs_have_types


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.open(tmp_path)


# Stop strings. The oracle walks character by character: the text ends where any stop string is first complete.


def _cut(text: str, stops: list[str], include: bool) -> str:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[:end] if include else text[: end - max(map(len, ending))]
    return text


@given(
    st.text("abé日", max_size=30),
    st.lists(st.text("abé日", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_cut_the_text_at_the_same_place_however_it_is_tokenized(
    text: str, stops: list[str], include: bool
) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    one = Detokenizer(IncrementalDecoder(BYTE_LEVEL), stops, include_stop=include)
    sent = ""
    for token_id in ids:
        sent += one.push(token_id)
        assert _cut(text, stops, include).startswith(sent), "text was sent that the stop string takes back"
        if one.stopped_by is not None:
            break
    sent += one.finish()
    assert sent == _cut(text, stops, include)
    assert one.length == len(sent)
    assert (one.stopped_by is not None) == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["</answer>", "\n\n"])
    assert stops.held_back("some text") == 0
    assert stops.held_back("some text <") == 1
    assert stops.held_back("some text </answer") == 8
    assert stops.held_back("line\n") == 1
    assert stops.held_back("") == 0


def test_stop_strings_before_min_tokens_do_not_count() -> None:
    ids = [BYTE_LEVEL.encode(letter, add_special_tokens=False)[0] for letter in "axbxcx"]
    detokenizer = Detokenizer(IncrementalDecoder(BYTE_LEVEL), ["x"], min_tokens=3)
    sent = ""
    for token_id in ids:
        sent += detokenizer.push(token_id)
        if detokenizer.stopped_by:
            break
    assert sent == "axb"
    assert detokenizer.num_tokens == 4


def test_a_silent_end_token_counts_but_adds_no_text() -> None:
    detokenizer = Detokenizer(IncrementalDecoder(BYTE_LEVEL, skip_special_tokens=False))
    assert detokenizer.push(2, silent=True) == ""
    assert detokenizer.push(2) == "<|im_end|>"
    assert detokenizer.num_tokens == 2


def test_tokenizing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, pathlib; from octavo.text.tokenizer import Tokenizer; import octavo.text.chat_template, "
        "octavo.text.detokenizer; Tokenizer.open(pathlib.Path(sys.argv[1])); "
        "sys.exit(bool({'torch', 'transformers', 'numba'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(TINY)], check=False).returncode == 0
