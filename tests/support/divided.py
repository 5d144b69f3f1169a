"""A model, or one rank's share of it, in a step of prompts, and how far logits are from those of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hf_oracle import scattered_logits
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.quant.adapter_files import AdapterError, digest_of
from octavo.runtime.config import EngineConfig
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.model.weights import load_model
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.group import ALONE, Group
from octavo.runtime.worker import kv_cache

LENGTHS = (37, 21, 30)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in LENGTHS]


def prefilled(group: Group, directory: Path, settings: dict[str, Any], lengths: list[int]) -> Any:
    """(logits, the residual stream behind each layer) of a step of prompts."""
    model = load_model(EngineConfig(model=str(directory), **settings), group=group)
    kept: list[Tensor] = []
    caches = kv_cache.allocate(model, len(lengths), max(lengths), model.dtype)
    generator = torch.Generator().manual_seed(5)
    token_ids = torch.randint(0, min(model.vocab_size, 1000), (sum(lengths),), generator=generator)
    step = StepInputs.prefill(lengths, max(lengths), token_ids=token_ids, logits_index=range(sum(lengths)))
    logits = model.forward(step, caches, lambda _, residual: kept.append(residual.clone()))
    return logits, kept


def adapted_logits(group: Group, base: Path, adapters: list[Path], parallel: ParallelConfig) -> list[Tensor] | str:
    """Logits of three prompts, of which the second has no adapter; or what is said against one of the adapters."""
    lora = LoraOptions(enable_lora=True, max_loras=2)
    model = load_model(EngineConfig(model=str(base), dtype="float32", lora=lora, parallel=parallel), group=group)
    assert model.adapters is not None
    try:
        for slot, directory in enumerate(adapters):
            loaded = model.adapters.load(directory, digest_of(directory), is_checked=group.rank > 0)
            model.adapters.put(slot, loaded)
    except AdapterError as error:
        return str(error)
    return scattered_logits(model, prompts(), slots=[0, -1, 1])


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL of ours from theirs."""
    ours = ours.double().log_softmax(-1)
    theirs = theirs.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


class Pretended(type(ALONE)):  # type: ignore[misc]
    """A group that is only asked how large it is."""

    def __init__(self, size: int) -> None:
        self.size = size
