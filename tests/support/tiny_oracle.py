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
        self._greedy: dict[tuple[int, ...], list[int]] = {}
        self.tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(TINY)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return self.ids(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The ids of `count` tokens, end tokens as good as any other."""
        known = self._greedy.setdefault(tuple(ids), [])
        if len(known) < count:
            known[:] = self._continue(ids, count)
        return known[:count]

    @torch.inference_mode()
    def _continue(self, ids: list[int], count: int) -> list[int]:
        found = list(ids)
        for _ in range(count):
            found.append(int(self._logits(found)[-1].argmax()))
        return found[len(ids) :]

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocabulary]: row i is about token i + 1."""
        return self._logits(ids).log_softmax(-1)

    def _logits(self, ids: list[int]) -> torch.Tensor:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two threads that wait for each other beside a busy server take 100 times as long
        try:
            return self._model(torch.tensor([ids])).logits[0]
        finally:
            torch.set_num_threads(num_threads)

    def text(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def beams(self, ids: list[int], width: int, count: int) -> list[list[int]]:
        """transformers' own beam search, best first; end tokens as good as any other."""
        config = transformers.GenerationConfig(num_beams=width, num_return_sequences=width, max_new_tokens=count)
        config.pad_token_id = 0
        known = self._model.generation_config
        self._model.generation_config = config
        try:
            found = self._model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
        finally:
            self._model.generation_config = known
        return [row[len(ids) :] for row in found.tolist()]
