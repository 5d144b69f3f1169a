"""Quality of a quantized checkpoint, through the path that serves it: the wiring between calibration and runtime."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from octavo.calibration.verify import Logits, Quality, held_out_text, measure, windows
from octavo.kernels.attention.step import StepInputs
from octavo.quant.checkpoint import Checkpoint, read_config
from octavo.runtime.config import Dtype, EngineConfig
from octavo.runtime.device import choose_device, free_memory
from octavo.runtime.kv_cache import allocate
from octavo.runtime.model.model import Model
from octavo.runtime.model.weights import load_model

WINDOW = 256
BLOCK = 16


class QualityError(RuntimeError):
    """Quality can't be measured here; the message says why. The checkpoint itself is good."""


def measure_quality(original: Path, quantized: Path, *, max_tokens: int, dtype: Dtype = "auto") -> Quality:
    """Load both models as the server would and compare them over the held-out text, `max_tokens` of it.

    Raises QualityError when both together don't fit into memory or the text can't be tokenized, and what load_model
    raises for a model that can't be served.
    """
    _check_memory(original, quantized)
    token_windows = _held_out_windows(original, max_tokens)
    models = [load_model(EngineConfig(model=str(path), dtype=dtype)) for path in (original, quantized)]
    with torch.inference_mode():
        return measure(_logits(models[0]), _logits(models[1]), token_windows)


def _check_memory(original: Path, quantized: Path) -> None:
    needed = _bytes_to_serve(original) + _bytes_to_serve(quantized)
    free = free_memory(choose_device("auto"))
    if needed * 1.2 > free:
        raise QualityError(
            f"both models take some {needed * 1.2 / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
        )


def _bytes_to_serve(directory: Path) -> int:
    """What a checkpoint's tensors take in memory; a CPU keeps fp8 as bf16."""
    checkpoint = Checkpoint.open(directory)
    specs = [checkpoint.spec(name) for name in checkpoint.names]
    return sum(spec.nbytes * (2 if spec.dtype == torch.float8_e4m3fn else 1) for spec in specs)


def _held_out_windows(directory: Path, max_tokens: int) -> list[Tensor]:
    """The text in the model's own tokens, each window behind the BOS token if the tokenizer puts one there."""
    tokenizer = _tokenizer(directory)
    plain, framed = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    prefix = framed[: framed.index(plain[0])]
    token_ids = tokenizer.encode(held_out_text(), add_special_tokens=False).ids[:max_tokens]
    config = read_config(directory)
    vocab_size = (config.get("text_config") or config).get("vocab_size")
    if vocab_size is not None and max(token_ids) >= vocab_size:
        raise QualityError(f"the tokenizer gives token {max(token_ids)}, and the model has {vocab_size}")
    return windows(token_ids, WINDOW, prefix)


def _tokenizer(directory: Path) -> Tokenizer:
    """From tokenizer.json; transformers, which takes seconds to import, converts what has none."""
    try:
        if (directory / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(directory / "tokenizer.json"))
        from transformers import AutoTokenizer

        converted: Tokenizer = AutoTokenizer.from_pretrained(directory).backend_tokenizer
        return converted
    except Exception as e:  # tokenizers raises nothing narrower
        raise QualityError(f"{directory} has no tokenizer that can be loaded: {e}") from e


def _logits(model: Model) -> Logits:
    """All logits of one window in one prefill step, over a cache of its own."""
    caches = allocate(model, WINDOW // BLOCK, BLOCK, model.dtype)

    def run(token_ids: Tensor) -> Tensor:
        return model.forward(_whole_window(token_ids.to(model.device)), caches).float().cpu()

    return run


def _whole_window(token_ids: Tensor) -> StepInputs:
    length, device = token_ids.shape[0], token_ids.device
    positions = torch.arange(length, device=device)
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=positions,
        block_tables=torch.arange(-(-length // BLOCK), dtype=torch.int32, device=device).unsqueeze(0),
        seq_lens=torch.tensor([length], dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, length], dtype=torch.int32, device=device),
        logits_index=positions,
        max_query_len=length,
        max_seq_len=length,
    )
