"""What a checkpoint calls its language-model head."""

from __future__ import annotations


def head_name(prefix: str) -> str:
    """The module of the head; prefix: what stands before the decoder's own names, such as `model.`."""
    return "language_model.lm_head" if prefix == "language_model.model." else "lm_head"
