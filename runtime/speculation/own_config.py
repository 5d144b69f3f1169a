"""The configuration of what makes drafts beside the model that is served."""

from __future__ import annotations

from typing import Any

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.lora_config import LoraOptions


def own_config(config: EngineConfig, **changed: Any) -> EngineConfig:
    """The engine's without what is of the served model alone; changed: by field, what else is another."""
    return msgspec.structs.replace(
        config,
        lm_head_dtype="auto",
        deterministic=False,
        lora=LoraOptions(),
        speculative_config=None,
        **changed,
    )
