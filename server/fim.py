"""Fill in the middle: how a model is asked for what stands between a prompt and a suffix.

Which way a model was trained is read from its tokenizer: each way has special tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from octavo.server.errors import bad_request
from octavo.server.prompts import encode
from octavo.server.served_model import ServedModel

SPACER = "☺"  # a text of its own in front of a suffix: some tokenizers put a space before every text


class FimFormat(NamedTuple):
    """The special tokens around the parts. suffix_first: the suffix comes before the prompt, and no middle token."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()
    suffix_first: bool = False


FORMATS = (
    FimFormat(  # Qwen2.5-Coder, CodeGemma
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
        ("<|fim_pad|>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>", "<|endoftext|>"),
    ),
    # StarCoder, then SantaCoder
    FimFormat("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<fim_pad>", "<file_sep>", "<|endoftext|>")),
    FimFormat("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<fim-pad>", "<|endoftext|>")),
    FimFormat("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),  # CodeLlama
    FimFormat("<PRE>", "<SUF>", "<MID>", ("<EOT>",)),  # CodeLlama, as some have converted it
    FimFormat("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    FimFormat("[PREFIX]", "[SUFFIX]", "", suffix_first=True),  # Codestral
)  # fmt: skip


@dataclass(frozen=True)
class Fim:
    """A format in a tokenizer's ids."""

    prefix: int
    suffix: int
    middle: int | None
    end_ids: tuple[int, ...]

    def prompt(self, before: Sequence[int], after: Sequence[int], begin: Sequence[int]) -> list[int]:
        """The token ids between which the middle is to come; begin: what stands before every text (a BOS token)."""
        if self.middle is None:
            return [*begin, self.suffix, *after, self.prefix, *before]
        return [*begin, self.prefix, *before, self.suffix, *after, self.middle]


def fim_of(model: ServedModel) -> Fim | None:
    """How this model fills in; None where its tokenizer has no such tokens."""
    find = model.tokenizer.token_id
    for form in FORMATS:
        prefix = find(form.prefix)
        suffix = find(form.suffix)
        middle = find(form.middle) if form.middle else None
        if prefix is None or suffix is None or (middle is None and not form.suffix_first):
            continue
        own = [prefix, suffix, middle, *map(find, form.ends)]
        return Fim(prefix, suffix, middle, tuple(token for token in own if token is not None))
    return None


def needed_fim(model: ServedModel) -> Fim:
    """fim_of, for a request that has a suffix. Raises ApiError."""
    fim = fim_of(model)
    if fim is None:
        raise bad_request(
            "suffix: this model's tokenizer has no tokens to fill in the middle with (such as <|fim_prefix|>): leave "
            "it out, or serve a code model that was trained to",
            "suffix",
        )
    return fim


def suffix_ids(suffix: str, model: ServedModel) -> list[int]:
    """The token ids of a text that stands behind another one."""
    spaced = encode(SPACER + suffix, "suffix", model, add_special_tokens=False, must_fit=True)
    spacer = encode(SPACER, "suffix", model, add_special_tokens=False, must_fit=True)
    if spaced[: len(spacer)] == spacer:
        return spaced[len(spacer) :]
    return encode(suffix, "suffix", model, add_special_tokens=False, must_fit=True)
