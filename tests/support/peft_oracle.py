"""Adapters that PEFT makes and saves, with random weights, and what PEFT's own forward pass computes with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # of all of them, as transformers has them
LENGTHS = (29, 17, 23)


def prompts(vocab: int = 96) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the logits' size; test_decoder.py says what float32's rounding may do: three times as much."""
    error = float((ours - theirs).abs().max())
    assert error <= 1e-4 * float(theirs.abs().max()), error


class PeftOracle:
    """A copy of a transformers model with one adapter, saved in a directory. config: of PEFT's LoraConfig.

    saving: arguments of save_pretrained.
    """

    def __init__(
        self, base: Any, directory: Path, *, seed: int = 0, saving: Mapping[str, Any] | None = None, **config: Any
    ) -> None:
        settings = {"r": 4, "lora_alpha": 10, "target_modules": [*ATTENTION, *GATED], "lora_dropout": 0.1} | config
        with warnings.catch_warnings():  # PEFT asks transformers by a name that is about to go
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)  # a head adapted by itself
            warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)  # of parameters they do
            self.model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
        self.directory = directory
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                size = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
                noise = torch.randn(parameter.shape, generator=generator) * size * (1.0 if "lora_A" in name else 0.3)
                parameter.data.copy_(parameter.data * (1 + noise) if "magnitude" in name else noise)
        with warnings.catch_warnings():  # and beside adapters of embeddings it saves these as they are, with a warning
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
            self.model.save_pretrained(directory, **(saving or {}))

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """[length, vocabulary]."""
        found: Tensor = self.model(torch.tensor([token_ids]), use_cache=False).logits[0]
        return found

    def merged(self) -> Any:
        """The model with the adapter in its weights."""
        return copy.deepcopy(self.model).merge_and_unload()
