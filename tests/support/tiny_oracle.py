"""The tiny checkpoint in transformers, in float32: what a server of it must answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"


class Oracle:
    """Its tokenizer and its model."""

    def __init__(self) -> None:
        self.tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(TINY)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return self.ids(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @torch.inference_mode()
    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The ids of `count` tokens, end tokens as good as any other."""
        out = list(ids)
        for _ in range(count):
            out.append(int(self._model(torch.tensor([out])).logits[0, -1].argmax()))
        return out[len(ids) :]

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocabulary]: row i is about token i + 1."""
        return self._model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def text(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
