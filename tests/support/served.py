"""What the serving path makes of a checkpoint: its logits, computed in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from hf_oracle import BLOCK_SIZE, NUM_BLOCKS, Sequences
from torch import Tensor

from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.weights import load_model


def logits_of(directory: Path, token_ids: Tensor, device: Device | None = None) -> Tensor:
    """[S, T, vocab] of token ids [S, T], as many sequences at a time as the cache holds.

    The KV cache is in float32, whatever the checkpoint asks for.
    """
    model = load_model(EngineConfig(model=str(directory), dtype="float32"), device)
    at_once = NUM_BLOCKS // -(-token_ids.shape[1] // BLOCK_SIZE)
    parts = torch.split(token_ids, at_once)
    return torch.cat([_logits(Sequences(model, part.tolist(), seed=0), part) for part in parts])


def _logits(sequences: Sequences, token_ids: Tensor) -> Tensor:
    rows = sequences.step(dict.fromkeys(range(len(token_ids)), token_ids.shape[1]))
    return torch.stack([logits for _, _, logits in rows]).unflatten(0, token_ids.shape)
