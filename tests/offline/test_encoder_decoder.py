"""octavo.LLM of an encoder-decoder, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_encdec
import tokenizers
from tiny_encdec import END

from octavo import LLM, SamplingParams
from octavo.text.tokenizer import Tokenizer

TEXTS = ["the cat sat.", "translate to German: a dog is 7", "x"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Its answers begin with token 7."""
    directory = tmp_path_factory.mktemp("bart")
    return directory, tiny_encdec.make("bart", directory, forced_bos_token_id=7)


@pytest.fixture(scope="module")
def bart(forked: None, made: tuple[Path, Any], small: dict[str, Any]) -> Iterator[LLM]:  # noqa: ARG001
    with LLM(str(made[0]), **small) as found:
        yield found


def test_prompts_are_read_by_the_encoder(bart: LLM, made: tuple[Path, Any]) -> None:
    """As text, as token ids, and as vLLM's dictionaries with or without what the decoder begins with."""
    directory, theirs = made
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    begin = tokenizer.encode("a cat", add_special_tokens=False).ids
    params = SamplingParams(temperature=0, max_tokens=9)
    plain = bart.generate([TEXTS[0], {"prompt_token_ids": ids[1]}, TEXTS[2]], params)
    truth = [tiny_encdec.generated(theirs, one, 9) for one in ids]
    assert [output.outputs[0].token_ids for output in plain] == truth
    assert [answer[0] for answer in truth] == [7, 7, 7]
    assert plain[0].outputs[0].text == tokenizer.decode(truth[0])
    assert (plain[0].encoder_prompt, plain[0].encoder_prompt_token_ids) == (TEXTS[0], ids[0])
    assert (plain[0].prompt, plain[0].prompt_token_ids) == (None, [END])
    explicit = [
        {"encoder_prompt": TEXTS[0], "decoder_prompt": "a cat"},
        {"encoder_prompt": {"prompt_token_ids": ids[1]}, "decoder_prompt": [END, *begin]},
        {"encoder_prompt": TEXTS[2], "decoder_prompt": None},
    ]
    found = bart.generate(explicit, params)
    assert [output.outputs[0].token_ids for output in found] == [
        tiny_encdec.generated(theirs, ids[0], 9, begin=[END, *begin]),
        tiny_encdec.generated(theirs, ids[1], 9, begin=[END, *begin]),
        truth[2],
    ]
    assert (found[0].prompt, found[0].prompt_token_ids) == ("a cat", [END, *begin])
    with pytest.raises(ValueError, match=r"prompts: octavo does not support 'mm_processor_kwargs' beside 'encoder_pr"):
        bart.generate({"encoder_prompt": "x", "mm_processor_kwargs": {"a": 1}}, params)
    with pytest.raises(ValueError, match=r"decoder_prompt has 71 tokens"):
        bart.generate({"encoder_prompt": "x", "decoder_prompt": [5] * 70}, params)


@pytest.mark.slow
def test_marian_translates_with_its_own_tokenizer(forked: None, small: dict[str, Any], tmp_path: Path) -> None:  # noqa: ARG001
    theirs = tiny_encdec.save_marian(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    texts = ["The house is small.", "a dog"]
    with LLM(str(tmp_path), **small) as llm:
        found = llm.generate(texts, SamplingParams(temperature=0, max_tokens=9))
    truth = [tiny_encdec.generated(theirs, tokenizer.encode(text), 9) for text in texts]
    assert [output.outputs[0].token_ids for output in found] == truth


def test_a_decoder_has_no_encoder(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"encoder_prompt: this model has no encoder"):
        llm.generate({"encoder_prompt": "x"}, SamplingParams(max_tokens=1))
