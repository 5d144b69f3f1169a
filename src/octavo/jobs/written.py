"""Whether a checkpoint writes text, which `octavo cost` and `octavo bench startup` measure: told before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OF_VECTORS = "octavo bench serve --backend openai-embeddings measures texts and tokens a second"


def why_unwritten(directory: Path, serve_flags: Sequence[str]) -> str | None:
    """Why a checkpoint that is served with these flags writes no answers to prompts, in a line; None: it does.

    Raises CheckpointError.
    """
    from octavo.quant.checkpoint import read_config
    from octavo.runtime.config import EngineConfig
    from octavo.runtime.model.families.registry import SPEECH
    from octavo.runtime.model.pooler_choice import is_pooled

    config = read_config(directory)
    model_type = config.get("model_type")
    if model_type in SPEECH:
        return f"it writes no answers to prompts: {model_type} reads recordings, which nothing here measures"
    asked: Mapping[str, Any] = _asked(serve_flags)
    try:
        pooled = is_pooled(EngineConfig(model=str(directory), **asked), config)
    except ValueError as e:
        return str(e)
    if pooled:
        return f"it writes no answers to prompts but makes vectors or scores; {OF_VECTORS}"
    return None


def _asked(flags: Sequence[str]) -> dict[str, str]:
    """What flags of `octavo serve` say of what the model is served for: fields of EngineConfig."""
    from octavo.server.start.flags import TASKS

    found: dict[str, str] = {}
    for at, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        value = value if equals else next(iter(flags[at + 1 :]), "")
        if name in ("--runner", "--convert"):
            found[name.removeprefix("--")] = value
        elif name == "--task":
            found |= TASKS.get(value, {})
        elif name == "--is-embedding":
            found["runner"] = "pooling"
    return found
