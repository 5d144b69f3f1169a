"""Flags of decoders that models with an encoder aren't served with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from octavo.runtime.config import EngineConfig
from octavo.runtime.model.sources import LoadError

Flags = Mapping[str, Callable[[EngineConfig], bool]]
"""By name: whether a config has it."""

FOR_DECODERS: Flags = {
    "--deterministic": lambda config: config.deterministic,
    "--enable-lora": lambda config: config.lora.enable_lora,
    "--load-format dummy": lambda config: config.load_format == "dummy",
    "--speculative-config": lambda config: config.speculative_config is not None,
    "--kv-offloading-path": lambda config: config.kv_offloading_path is not None,
    "--tensor-parallel-size or --pipeline-parallel-size": lambda config: config.parallel.num_ranks > 1,
}


def refuse_flags(config: EngineConfig, flags: Flags, what: str) -> None:
    """Raise LoadError for the first of these flags that was given. what: the model's kind, for the error."""
    if flag := next((flag for flag, is_given in flags.items() if is_given(config)), None):
        raise LoadError(f"{flag}: {what}, which is not served with it; leave it out")
