"""What the server knows of the model that it serves: names, tokenizer, templates, default sampling, end tokens."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from octavo.server.dialects.protocol import GenerationRequest
from octavo.server.errors import explain
from octavo.server.template_renderer import TemplateRenderer
from octavo.text.tokenizer import Tokenizer

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ServedModel:
    """One model. `end_ids` end an answer unless a request ignores them; `defaults` stand in for absent fields.

    max_model_len and vocab_size are the engine's: a token id below vocab_size may still be unused by the tokenizer.
    """

    names: tuple[str, ...]
    root: str
    tokenizer: Tokenizer
    renderer: TemplateRenderer
    end_ids: frozenset[int]
    defaults: dict[str, float]
    max_model_len: int
    vocab_size: int
    max_logprobs: int = 20
    trust_request_chat_template: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """The name in responses and metrics."""
        return self.names[0]

    def card(self, name: str) -> dict[str, Any]:
        """The model in /v1/models, under one of its names."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "octavo",
            "root": self.root,
            "parent": None,
            "max_model_len": self.max_model_len,
        }


def sampling_defaults(directory: Path, source: str, override: dict[str, float]) -> dict[str, float]:
    """Default sampling values: of the checkpoint's generation_config.json ('auto'), or none ('vllm'), then `override`.

    Another value of `source` is a directory, or a file, to read instead. ValueError for a value that no request may
    have.
    """
    config = {}
    if source != "vllm":
        path = directory if source == "auto" else Path(source)
        config = _read(path if path.is_file() else path / "generation_config.json")
        if source != "auto" and not config:
            raise ValueError(
                f"--generation-config {source!r}: no generation_config.json there; 'auto' and 'vllm' are names"
            )
    defaults = {name: config[name] for name in SAMPLING_DEFAULTS if config.get(name) is not None} | override
    try:
        GenerationRequest.model_validate(defaults)
    except ValidationError as error:
        first = error.errors()[0]
        message, _ = explain({**first, "loc": ("defaults", *first["loc"])})
        raise ValueError(f"--generation-config, --override-generation-config: {message}") from None
    return defaults


def end_token_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """All tokens that end an answer: the tokenizer's, and generation_config.json's, or else config.json's."""
    generation = _read(directory / "generation_config.json")
    config = _read(directory / "config.json")
    text_config = config.get("text_config") or {}
    listed = generation.get("eos_token_id", config.get("eos_token_id", text_config.get("eos_token_id")))
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    return frozenset(ids)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content
