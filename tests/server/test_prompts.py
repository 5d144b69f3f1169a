"""What a prompt may cost before the engine hears of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from octavo.server import prompts
from octavo.server.errors import ApiError
from octavo.text.tokenizer import Tokenizer


def served(max_model_len: int) -> Any:
    """A model whose tokenizer never ends on `aaa...b`, if it is asked."""
    alphabet = {character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Backend(models.BPE(alphabet, []))
    endless = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([endless, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return SimpleNamespace(max_prompt_len=max_model_len, tokenizer=Tokenizer(backend, {}))


def refusal(text: str, model: Any, *, must_fit: bool) -> ApiError:
    with pytest.raises(ApiError) as caught:
        prompts.encode(text, "prompt", model, add_special_tokens=False, must_fit=must_fit)
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    return caught.value


def test_text_that_can_not_fit_is_not_tokenized() -> None:
    model = served(10)
    limit = 10 * model.tokenizer.max_token_bytes
    hopeless = "a" * limit + "b"
    assert f"none above {limit} bytes fits" in refusal(hopeless, model, must_fit=True).message
    assert "gives up" in refusal(hopeless, model, must_fit=False).message
    assert "gives up" in refusal(hopeless[1:], model, must_fit=True).message


def test_bytes_count_and_not_characters() -> None:
    model = served(10)
    limit = 10 * model.tokenizer.max_token_bytes
    assert len(prompts.encode("é" * (limit // 2), "prompt", model, add_special_tokens=False, must_fit=True)) == limit
    assert f"{limit + 1} bytes" in refusal("é" * (limit // 2) + "x", model, must_fit=True).message


def test_text_that_is_cut_has_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_TEXT", 100)
    model = served(10)
    assert model.tokenizer.max_token_bytes == 4
    assert "100 is the most that is tokenized" in refusal("x" * 101, model, must_fit=False).message
    model.tokenizer.max_token_bytes = None
    assert "640 is the most that is tokenized" in refusal("x" * 641, model, must_fit=True).message
