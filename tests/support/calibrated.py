"""A tiny model's calibration: token ids as they are, such as those of octavo's own held-out text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import octavo.calibration
from octavo.calibration.prepare import Calibration
from octavo.calibration.text.data import from_token_ids
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.model.blocks import BlockRunner
from octavo.runtime.model.sources import CheckpointSource


def calibration(model: Path, token_ids: Tensor) -> Calibration:
    """token_ids [num_samples, seq_len]."""
    checkpoint = Checkpoint.open(model)
    runner = BlockRunner(checkpoint.config, CheckpointSource(checkpoint).prefix, token_ids.shape[1])
    data = from_token_ids(list(token_ids), vocab_size=runner.spec.vocab_size, source="a test")
    return Calibration(data, runner)


def held_out_tokens(model: Path, num_samples: int = 32, seq_len: int = 64) -> Tensor:
    """[num_samples, seq_len] of the text's beginning."""
    held_out = Path(octavo.calibration.__file__).with_name("held_out.txt").read_text()
    token_ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(held_out).ids
    return torch.tensor(token_ids[: num_samples * seq_len]).view(num_samples, seq_len)
