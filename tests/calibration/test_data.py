"""Which tokens a calibration set has: chosen by the seed, packed into windows, and enough of them or an error."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibration.text.data import (
    CalibrationData,
    ConversationError,
    Sizes,
    TooFewTokensError,
    check_disjoint,
    fingerprint,
    from_dataset,
    from_records,
    from_token_ids,
)
from octavo.calibration.text.documents import DataError
from octavo.calibration.text.records import Message

BOS, END = 1, 2


class Letters:
    """A tokenizer whose tokens are characters, with BOS before a text where it is told so; a template of its own."""

    def __init__(self, *, bos: bool = False, has_chat_template: bool = False, vocab_size: int = 0x3000) -> None:
        self.bos, self.has_chat_template, self.vocab_size = bos, has_chat_template, vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * (self.bos and add_special_tokens) + [ord(character) for character in text]

    def render(self, messages: Sequence[Message]) -> str:
        if messages[0]["role"] != "user":
            raise ConversationError("a user speaks first")
        return chr(BOS) * self.bos + "".join(f"{m['role'][0]}:{m['content']}{chr(END)}" for m in messages)


def text_of(data: CalibrationData) -> list[str]:
    return ["".join(map(chr, sample.tolist())) for sample in data.samples]


def test_documents_are_packed_into_windows() -> None:
    data = from_records(["aaaa", "bbbb", "cccc"], Letters(), Sizes(3, 6))
    # a blank line between them, since nothing else says where a text ends; the order is the seed's
    assert sorted("".join(text_of(data)).split("\n\n")[:3]) == ["aaaa", "bbbb", "cccc"]
    assert [sample.shape for sample in data.samples] == [(6,)] * 3
    assert all(sample.dtype == torch.int64 for sample in data.samples)
    assert data.source == "the records given: 3 samples of 6 tokens, out of 3 of 3 documents, seed 0"
    assert data.num_tokens == 18


def test_every_window_begins_with_bos_and_none_twice() -> None:
    data = from_records(["a" * 25, "b" * 25, "c" * 3], Letters(bos=True), Sizes(6, 10))
    for window in text_of(data):
        assert window[0] == chr(BOS)
        assert window[1] != chr(BOS)
        assert len(window) == 10
    chat = {"messages": [{"role": "user", "content": "Q" * 9}, {"role": "assistant", "content": "A" * 9}]}
    data = from_records([chat] * 4, Letters(bos=True, has_chat_template=True), Sizes(4, 8))
    assert all(window[0] == chr(BOS) and window[1] != chr(BOS) for window in text_of(data))


def test_every_document_has_a_part_before_the_rest_of_a_long_one() -> None:
    long, short = "x" * 1000, [chr(ord("a") + i) * 8 for i in range(10)]
    few = "".join(text_of(from_records([long, *short], Letters(), Sizes(11, 10))))
    assert set("abcdefghij") <= set(few)  # 11 documents, 10 tokens of each
    assert few.count("x") == 10
    many = "".join(text_of(from_records([long, *short], Letters(), Sizes(100, 10))))
    assert many.count("x") > 800


def test_a_template_is_used_where_there_is_one() -> None:
    pair = {"prompt": "Q", "completion": "A"}
    chat = {"messages": [{"role": "user", "content": "Q"}]}
    assert text_of(from_records([pair], Letters(has_chat_template=True), Sizes(1, 8))) == ["u:Q\2a:A\2"]
    assert text_of(from_records([pair], Letters(), Sizes(1, 4))) == ["QA\n\n"]
    with pytest.raises(DataError, match=r"entry 1 is a conversation, and the model has no chat template: .*--chat-te"):
        from_records([chat], Letters(), Sizes(1, 4))


def test_conversations_that_a_template_refuses_are_counted() -> None:
    good = {"messages": [{"role": "user", "content": "Q" * 100}]}
    bad = {"messages": [{"role": "system", "content": "S"}]}
    encoder = Letters(has_chat_template=True)
    (note,) = from_records([bad, good, bad], encoder, Sizes(2, 43)).notes  # the rest of the good one comes last
    assert re.fullmatch(r"2 conversations left out, first the records given: entry [13]: a user speaks first", note)
    with pytest.raises(TooFewTokensError, match=r"2 conversations left out, first the records given: entry [23]: a us"):
        from_records([good, bad, bad], encoder, Sizes(3, 43))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    num_samples=st.integers(1, 8),
    length=st.integers(3, 40),
    bos=st.booleans(),
)
def test_too_little_says_what_there_is_and_what_works(
    sizes: list[int], num_samples: int, length: int, bos: bool
) -> None:
    encoder, records = Letters(bos=bos), ["a" * size for size in sizes]
    problem = ""
    try:
        data = from_records(records, encoder, Sizes(num_samples, length))
    except TooFewTokensError as e:
        problem = str(e)
    if not problem:
        assert [len(sample) for sample in data.samples] == [length] * num_samples
        return
    total = sum(len(encoder.encode(text)) + (0 if bos else 2) for text in records)
    assert f"with {total:,} tokens give" in problem
    assert f"{num_samples:,} are needed ({num_samples * length:,} tokens)" in problem
    for name, number in re.findall(r"--(num-calibration-samples|max-seq-length) (\d+)", problem):
        wanted = Sizes(int(number), length) if name.startswith("num") else Sizes(num_samples, int(number))
        assert len(from_records(records, encoder, wanted).samples) == wanted.num_samples


def test_the_seed_and_nothing_else_decides() -> None:
    records = [f"document {i} " * 5 for i in range(50)]
    first = from_records(records, Letters(), Sizes(8, 64, seed=1))
    again = from_records(records, Letters(), Sizes(8, 64, seed=1))
    other = from_records(records, Letters(), Sizes(8, 64, seed=2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.samples[0].tolist() == again.samples[0].tolist()
    # written down once: another version of Python or torch must choose the same, or no run could be repeated
    assert first.fingerprint.startswith("6569d996be5f7a99")


def test_the_fingerprint_is_of_lengths_and_ids() -> None:
    samples = [torch.tensor([1, 2, 3]), torch.tensor([70_000])]
    expected = hashlib.sha256(struct.pack("<QqqqQq", 3, 1, 2, 3, 1, 70_000)).hexdigest()
    assert fingerprint(samples) == expected == fingerprint([sample.int() for sample in samples])
    assert fingerprint([torch.tensor([1, 2]), torch.tensor([3, 70_000])]) != expected


@pytest.mark.parametrize("records", [[], [""], [{"text": " \n"}, {"messages": []}]])
def test_no_text_at_all(records: list[object]) -> None:
    with pytest.raises(DataError, match="the records given holds no text: there is nothing to calibrate on"):
        from_records(records, Letters(), Sizes(1, 8))


def test_sizes_that_cannot_be_meant() -> None:
    with pytest.raises(DataError, match="--num-calibration-samples 0: 1 at least"):
        Sizes(0, 8)
    with pytest.raises(DataError, match="--max-seq-length 1: 2 at least"):
        Sizes(1, 1)
    with pytest.raises(DataError, match="--max-seq-length 2: 3 at least"):
        from_records(["abc"], Letters(bos=True), Sizes(1, 2))


def test_tokens_outside_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match=r"entry 2: the tokenizer gives token 9731, and the model has 256: it is anoth"):
        from_records(["abc", "☃"], Letters(vocab_size=256), Sizes(2, 5))
    with pytest.raises(DataError, match="half of a surrogate pair"):
        from_records(["abc\ud800"], Utf8(), Sizes(1, 4))


class Utf8(Letters):
    """As the tokenizers library has it: text that is no UTF-8 can't be handed over."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002
        return list(text.encode())


def test_token_ids_of_ones_own() -> None:
    data = from_token_ids([torch.tensor([1, 2]), torch.tensor([3, 4], dtype=torch.int32)], vocab_size=6, source="it")
    assert [sample.tolist() for sample in data.samples] == [[1, 2], [3, 4]]
    for samples, message in [
        ([], "there is no sample"),
        ([torch.tensor([1, 6])], r"sample 0 has token 6, and the model's vocabulary is 0\.\.5"),
        ([torch.tensor([1, -1])], "sample 0 has token -1"),
        ([torch.tensor([1, 2]), torch.tensor([1, 2, 3])], "samples have 2 to 3 tokens; needed is one length"),
        ([torch.tensor([1, 2]), torch.tensor([[1, 2]])], r"sample 1 is torch.int64 \[1, 2\]; needed are two integers"),
        ([torch.tensor([1.0, 2.0])], r"sample 0 is torch.float32"),
        ([torch.tensor([1])], "two integers or more"),
    ]:
        with pytest.raises(DataError, match=message):
            from_token_ids(samples, vocab_size=6, source="it")


def test_text_that_quality_is_measured_on_is_refused() -> None:
    held_out = list(range(100, 300))
    mixed = torch.tensor([5] * 20 + held_out[50:82] + [6] * 20)
    data = from_token_ids([torch.tensor([5, 6] * 36), mixed], vocab_size=1000, source="it")
    with pytest.raises(DataError, match="it: sample 1 holds a part of the held-out text, on which quality is measured"):
        check_disjoint(data, held_out, "the held-out text")
    check_disjoint(from_token_ids([mixed[:51]], vocab_size=1000, source="it"), held_out, "the held-out text")


def test_only_as_many_files_are_read_as_it_takes(tmp_path: Path) -> None:
    for i, content in enumerate(["a" * 30, "b" * 30]):
        (tmp_path / f"train-{i}.jsonl").write_text(json.dumps({"text": content}) + "\n")
    (tmp_path / "train-2.jsonl").write_text("broken\n")
    one = from_dataset(tmp_path, Letters(), Sizes(3, 10))
    assert set("".join(text_of(one))) == {"a"}
    assert one.source.startswith(f"{tmp_path.name}, 1 of 3 files: 3 samples of 10 tokens, out of 1 of 1 documents")
    two = from_dataset(tmp_path, Letters(), Sizes(6, 10))
    assert set("".join(text_of(two))) >= {"a", "b"}
    assert ", 2 of 3 files: " in two.source
    with pytest.raises(DataError, match=r"train-2\.jsonl:1: "):
        from_dataset(tmp_path, Letters(), Sizes(7, 10))
    with pytest.raises(
        TooFewTokensError, match=r"train-0\.jsonl: 1 document with 32 tokens give 3 samples of 10, and 4"
    ):
        from_dataset(tmp_path / "train-0.jsonl", Letters(), Sizes(4, 10))


def test_a_text_file_and_its_huge_line(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"Paragraph {i} of a book.\n\n" for i in range(5000)) + "word " * 500_000)
    data = from_dataset(file, Letters(), Sizes(16, 128, seed=3))
    assert len(data.samples) == 16
    assert len({sample[:40].numpy().tobytes() for sample in data.samples}) > 1
