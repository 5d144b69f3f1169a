"""How the drafts of one answer fared: vLLM's `metrics.speculative_decoding`, and SGLang's fields about the same.

Knows counts alone. What a step of the engine has checked comes with its output, so that an answer which goes on in
another engine is counted as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["none", "summary", "detailed"]


@dataclass(frozen=True, slots=True)
class DraftReports:
    """What answers tell of their drafts. num_spec_tokens: the most that a step checks of one answer."""

    level: Level = "none"
    num_spec_tokens: int = 0

    def begin(self) -> DraftMetrics | None:
        """Counts of an answer at its beginning; None where nothing is told."""
        if self.level == "none":
            return None
        return DraftMetrics(self.num_spec_tokens, is_detailed=self.level == "detailed")


@dataclass(slots=True)
class DraftMetrics:
    """Counts of one answer, over the steps that have checked drafts of it.

    counts: of the steps, by how many drafts each checked and how many of them were right. steps: these pairs in order,
    where is_detailed.
    """

    num_spec_tokens: int
    is_detailed: bool = False
    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    steps: list[tuple[int, int]] = field(default_factory=list)

    def count(self, checked: tuple[int, int]) -> None:
        """Add a step: (drafts that it checked, how many of them were right)."""
        self.counts[checked] = self.counts.get(checked, 0) + 1
        if self.is_detailed:
            self.steps.append(checked)

    @property
    def num_steps(self) -> int:
        return sum(self.counts.values())

    @property
    def num_drafts(self) -> int:
        return sum(drafts * times for (drafts, _), times in self.counts.items())

    @property
    def num_right(self) -> int:
        return sum(right * times for (_, right), times in self.counts.items())

    def histogram(self) -> list[int]:
        """How many steps had so many right drafts: entry j of num_spec_tokens + 1, more if more were ever checked."""
        longest = max([self.num_spec_tokens, *(drafts for drafts, _ in self.counts)])
        return _dense({right: self._steps_with(right) for _, right in self.counts}, longest)

    def to_dict(self) -> dict[str, Any]:
        """vLLM's `metrics.speculative_decoding`."""
        lengths = dict.fromkeys(drafts for drafts, _ in self.counts)
        by_length = {
            str(length): _dense({right: n for (drafts, right), n in self.counts.items() if drafts == length}, length)
            for length in lengths
        }
        found: dict[str, Any] = {
            "mean_acceptance_length": 1.0 + _ratio(self.num_right, self.num_steps),
            "draft_acceptance_rate": _ratio(self.num_right, self.num_drafts),
            "acceptance_histogram": self.histogram(),
            "acceptance_histogram_by_draft_length": by_length,
            "num_spec_steps": self.num_steps,
            "num_accepted_draft_tokens": self.num_right,
            "num_draft_tokens": self.num_drafts,
            "num_spec_tokens": self.num_spec_tokens,
        }
        if self.steps:
            found["per_step_accepted"] = [right for _, right in self.steps]
            found["per_step_drafted"] = [drafts for drafts, _ in self.steps]
        return found

    def of_sglang(self) -> dict[str, Any]:
        """SGLang's entries of `meta_info`. The length is that of steps that checked drafts: not all do, as there."""
        return {
            "spec_accept_rate": _ratio(self.num_right, self.num_drafts),
            "spec_accept_length": 1.0 + _ratio(self.num_right, self.num_steps),
            "spec_accept_histogram": self.histogram(),
            "spec_accept_token_num": self.num_right,
            "spec_draft_token_num": self.num_drafts,
            "spec_verify_ct": self.num_steps,
        }

    def _steps_with(self, right: int) -> int:
        return sum(times for (_, number), times in self.counts.items() if number == right)


def request_metrics(all_of: Sequence[DraftMetrics | None]) -> dict[str, Any]:
    """The entry `metrics` of a request's answer; nothing where none is told.

    As in vLLM it is null where there are several answers, each of which fared otherwise.
    """
    first = all_of[0]
    if first is None:
        return {}
    return {"metrics": {"speculative_decoding": first.to_dict()} if len(all_of) == 1 else None}


def _dense(counts: dict[int, int], longest: int) -> list[int]:
    return [counts.get(number, 0) for number in range(longest + 1)]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
