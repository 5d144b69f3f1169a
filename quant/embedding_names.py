"""What checkpoints call their embeddings: tables of which rows are looked up, and no linear layers."""

from __future__ import annotations

NAMES = ("embed_tokens", "embed_tokens_per_layer", "embeddings", "word_embeddings")


def is_embedding(module: str) -> bool:
    """Whether a module is a table of tokens' embeddings, by the last part of its name."""
    return module.rpartition(".")[2] in NAMES
