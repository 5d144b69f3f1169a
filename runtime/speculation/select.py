"""Who gives sequences their drafts, by a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from octavo.runtime.speculation.config import OF_MODELS, SpeculativeConfig
from octavo.runtime.speculation.costs import StepCosts
from octavo.runtime.speculation.ngram import OwnText
from octavo.runtime.speculation.speculation import Drafter, Speculates, Speculation
from octavo.runtime.speculation.suffix import SuffixDrafter

if TYPE_CHECKING:
    from octavo.runtime.config import EngineConfig
    from octavo.runtime.scheduling.plan import SchedulerConfig
    from octavo.runtime.speculation.model_speculation import Model
    from octavo.runtime.worker.worker import Worker


def speculation_of(
    config: EngineConfig, worker: Worker, limits: SchedulerConfig, weight_bytes: int, notes: list[str]
) -> Speculates | None:
    """What gives the sequences of an engine drafts; None where nothing does. A draft model or head is loaded here.

    weight_bytes: of the model that is served. Raises ValueError.
    """
    asked = config.speculative_config
    if asked is None or not drafts_by_model(asked):
        return make_speculation(asked, shares=config.share_suffixes)
    from octavo.runtime.speculation.model_speculation import Costs, ModelSpeculation

    model = _model_of(config, worker, limits, notes)
    return ModelSpeculation(
        model, asked.most_of, asked.num_speculative_tokens, Costs(model.weight_bytes / weight_bytes)
    )


def _model_of(config: EngineConfig, worker: Worker, limits: SchedulerConfig, notes: list[str]) -> Model:
    """A draft model or a head, with its cache. Nobody else needs their modules."""
    asked = config.speculative_config
    assert asked is not None
    if asked.method == "draft_model":
        from octavo.runtime.speculation.draft_files import load_draft_model

        return load_draft_model(config, worker, limits, notes)
    from octavo.runtime.speculation.head_cache import load_head_drafts

    return load_head_drafts(config, worker, limits, notes)


def drafts_by_model(config: SpeculativeConfig | None) -> bool:
    """A model or a head says what follows tokens that are known: then steps are not ordered ahead of results."""
    return config is not None and config.method in OF_MODELS


def make_speculation(config: SpeculativeConfig | None, *, shares: bool = False) -> Speculation | None:
    """What gives sequences drafts out of texts; None where nothing does. shares: as in SuffixDrafter."""
    if config is None:
        return None
    drafter = _drafter_of(config, shares=shares)
    return Speculation(drafter, config.num_speculative_tokens, StepCosts(), _most_of(config))


def _most_of(config: SpeculativeConfig) -> Callable[[int], int] | None:
    return config.most_of if config.num_speculative_tokens_per_batch_size else None


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
