"""Which drafter a configuration asks for."""

from __future__ import annotations

from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.runtime.speculation.costs import StepCosts
from octavo.runtime.speculation.ngram import OwnText
from octavo.runtime.speculation.speculation import Drafter, Speculation
from octavo.runtime.speculation.suffix import SuffixDrafter


def make_speculation(config: SpeculativeConfig | None, *, shares: bool = False) -> Speculation | None:
    """What gives an engine's sequences drafts; None where nothing does. shares: as in SuffixDrafter."""
    if config is None:
        return None
    return Speculation(_drafter_of(config, shares=shares), config.num_speculative_tokens, StepCosts())


def _drafter_of(config: SpeculativeConfig, *, shares: bool) -> Drafter:
    if config.method == "ngram":
        count = config.num_speculative_tokens
        return lambda _: OwnText(count, config.prompt_lookup_min, config.prompt_lookup_max)
    return SuffixDrafter(config, shares=shares).begin


def notes_of(config: SpeculativeConfig | None) -> list[str]:
    """A line for the table at start."""
    if config is None:
        return []
    most = config.num_speculative_tokens
    return [f"speculation: {config.method}, up to {most} drafts of a sequence a step, as many as pay by measured times"]
