"""How pairs of texts are cut, against the tokenizers library itself; and how much a request may send."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from octavo_server import TINY
from tiny_encoders import WORDS, save_tokenizer

from octavo.runtime.messages import PooledModel
from octavo.server.dialects.fields import MAX_TOKENS_SENT
from octavo.server.errors import ApiError
from octavo.server.pooled_inputs import MOST_REPEATED, Cut, PooledPrompt, Side, pair_prompt, repeated, within_total
from octavo.server.pooled_text import PooledText
from octavo.server.reranker_template import asked_pair
from octavo.server.served_model import ServedModel
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

LENGTHS = (0, 1, 2, 4, 5, 8, 9, 10, 17, 30)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenizers.Tokenizer, ServedModel]:
    directory: Path = tmp_path_factory.mktemp("pairs")
    backend = save_tokenizer(directory)
    tokenizer = Tokenizer.open(directory)
    renderer = TemplateRenderer(ChatTemplate.open(TINY, tokenizer.special_tokens, None))
    model = ServedModel(("m",), "m", tokenizer, renderer, frozenset({0}), {}, 512, 1024, 4)
    return backend, replace(model, pooled=PooledText(PooledModel(("classify",), 1, num_token_types=2)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("most", [9, 14, 15, 21])
def test_pairs_are_cut_as_longest_first_cuts_them(
    truth: tuple[tokenizers.Tokenizer, ServedModel], most: int, side: Side
) -> None:
    backend, model = truth
    backend.enable_truncation(most, strategy="longest_first", direction=side)
    words = [word for word in WORDS if word.isalpha()]
    for one in LENGTHS:
        for other in LENGTHS:
            first, second = (" ".join(words[i % len(words)] for i in range(n)) for n in (one, other))
            found = pair_prompt(first, second, "pair", model, Cut(most, side))
            wanted = backend.encode(first, second)
            assert found.token_ids == wanted.ids, (one, other)
            assert found.second == wanted.type_ids.index(1)


def test_a_reranker_s_documents_lose_their_end(truth: tuple[tokenizers.Tokenizer, ServedModel]) -> None:
    facts = PooledModel(("classify",), 1, template="qwen3_reranker")
    model = replace(truth[1], pooled=PooledText(facts))
    with pytest.raises(ApiError, match="truncation_side left: the instruction and the query stand in front"):
        asked_pair("red", "blue", "documents", model, Cut(100, "left"))


def test_too_many_tokens_are_refused_before_the_rest_is_made() -> None:
    made = []

    def prompts() -> Iterator[PooledPrompt]:
        half = [0] * (MAX_TOKENS_SENT // 2)
        for number in range(100):
            made.append(number)
            yield PooledPrompt(half)

    with pytest.raises(ApiError, match="in the first 3 texts; a request may send"):
        within_total(prompts(), "input")
    assert made == [0, 1, 2]


def test_a_prompt_before_many_texts_has_its_limit() -> None:
    assert repeated("a" * 100, 1000, "prompt") == 100_000
    with pytest.raises(ApiError, match="in front of each of 100 texts"):
        repeated("a" * (MOST_REPEATED // 99), 100, "prompt")


def test_a_query_is_tokenized_once(truth: tuple[tokenizers.Tokenizer, ServedModel]) -> None:
    backend, model = truth
    backend.no_truncation()
    known: dict[str, list[int]] = {}
    for document in ("cat", "a mat", "red"):
        found = pair_prompt("the cat", document, "pair", model, Cut(), known=known)
        assert found.token_ids == backend.encode("the cat", document).ids
        assert list(known) == ["the cat"]
    known["the cat"] = [7]  # what is known is not made again
    assert pair_prompt("the cat", "red", "pair", model, Cut(), known=known).token_ids[1:2] == [7]
