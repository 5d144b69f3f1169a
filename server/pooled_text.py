"""The text side of a model that generates nothing: prompts that stand before texts, and the names of labels.

Read from the files of sentence-transformers and config.json, as the engine's poolers are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.quant.model_files import read_object_if_any
from octavo.runtime.messages import PooledModel

WORKS = {
    "embed": "POST /v1/embeddings, /v2/embed, /score, /rerank and /pooling",
    "classify": "POST /classify, /pooling and, with one label, /score and /rerank",
    "token_classify": "POST /pooling",
}


@dataclass(frozen=True)
class PooledText:
    """What requests can be made of it.

    facts     the engine's
    prompts   texts that stand before a text, by name
    prompt    the one that stands there where a request names none; empty: none
    labels    their names, in the order of scores
    lowers    texts are lowercased first
    """

    facts: PooledModel
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    labels: tuple[str, ...] = ()
    lowers: bool = False

    @property
    def embeds(self) -> bool:
        return "embed" in self.facts.tasks

    @property
    def what_works(self) -> str:
        """The routes that answer, for errors."""
        return WORKS[self.facts.tasks[0]]


def read_pooled_text(directory: Path, facts: PooledModel) -> PooledText:
    """Read what there is. Raises ValueError, which names the file, for what can't be meant."""
    file = directory / "config_sentence_transformers.json"
    config = read_object_if_any(file)
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"{file}: prompts must be an object of texts")
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(f"{file}: default_prompt_name {default!r} is none of {', '.join(prompts)}")
    sentence = read_object_if_any(directory / "sentence_bert_config.json")
    labels = _labels(read_object_if_any(directory / "config.json"), facts.size)
    return PooledText(facts, prompts, prompts.get(default, ""), labels, bool(sentence.get("do_lower_case")))


def _labels(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The labels' names, of id2label where that has them."""
    named = config.get("id2label")
    named = named if isinstance(named, dict) else {}
    return tuple(str(named.get(str(number), f"LABEL_{number}")) for number in range(count))
