"""From results to the drafts of a second model or of a head: whether it is asked, and for how many of each sequence.

Unlike texts that are looked up, it takes time to say what it thinks; and what it would have said of a sequence that
goes on without drafts is not known. So the same number is asked for all sequences of a step, before it says anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Protocol

from octavo.runtime.scheduling.plan import StepPlan
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.speculation.costs import GAIN, StepCosts
from octavo.runtime.speculation.speculation import MOST_KIND, WEIGHT, WEIGHT_FOR_ALL, Chances, Followed

COUNTS = (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 64)
"""Drafts of a sequence among which is chosen: few, so that each is measured often, and can be recorded."""
PROBING = 0.005  # of the time that steps take, for asking where it doesn't pay: who wasn't asked has a text to read


class Costs:
    """What steps cost, of the model that is served and of the draft model.

    ratio: of a draft model's step to the other one's, before both were measured.
    """

    def __init__(self, ratio: float) -> None:
        self.steps = StepCosts()
        self.drafts = StepCosts()
        self._ratio = ratio

    def of_draft(self, num_sequences: int, plain: float) -> float:
        """Seconds for one draft of each, where a step without drafts takes `plain` of the same unit."""
        if self.steps.is_known and self.drafts.is_known:
            return float(self.drafts.seconds([num_sequences])[0])
        return self._ratio * plain


class Model(Protocol):
    """Who thinks: a draft model, or a head."""

    @property
    def weight_bytes(self) -> int:
        """What a draft reads of it."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether the last step was computed as later ones of its size will be."""
        ...

    def read(self, plan: StepPlan) -> None:
        """Take what a step that has been committed says; called for each one, before drafts are asked for."""
        ...

    def drafts(self, sequences: Rows[Sequence], count: int) -> list[list[int]]:
        """`count` tokens that may follow each, or none. All tokens of a sequence are known."""
        ...


class ModelSpeculation:
    """Gives sequences drafts of a draft model or a head. costs: None: as many as may be, whatever they cost."""

    def __init__(self, model: Model, most_of: Callable[[int], int], most: int, costs: Costs | None = None) -> None:
        """most: drafts of a sequence and step; most_of: the same, of steps of so many sequences."""
        self._model = model
        self._most_of = most_of
        self._most = most
        self._costs = costs
        self._chances = Chances(most, WEIGHT_FOR_ALL)
        self._seconds = 0.0  # of steps
        self._seconds_probing = 0.0

    def after(self, plan: StepPlan, seconds: float | None) -> None:
        """As `Speculation.after`."""
        if self._costs is not None and seconds is not None:
            self._costs.steps.take(plan, seconds)
            self._seconds += seconds
        self._model.read(plan)
        running: list[tuple[Sequence, Followed]] = []
        for it in plan.scheduled:
            sequence = it.sequence
            if sequence.has_ended or it.wants != "token":
                continue
            followed = sequence.drafting
            if not isinstance(followed, Followed):
                followed = sequence.drafting = Followed(Chances(self._most, WEIGHT, self._chances))
                followed.num_read = len(sequence.token_ids)
            followed.read(sequence, len(sequence.token_ids), self._chances)
            if not sequence.num_sampling and sequence.slot >= 0:
                running.append((sequence, followed))
        count = self._choose([followed for _, followed in running]) if running else 0
        if count:
            self._ask(running, count)
        elif running and self._most_of(len(running)) and self._seconds_probing < PROBING * self._seconds:
            self._seconds_probing += self._ask(running, 1)

    def _ask(self, running: list[tuple[Sequence, Followed]], count: int) -> float:
        """Get so many drafts of each; returns the seconds that it took."""
        begin = time.perf_counter()
        drafts = self._model.drafts([sequence for sequence, _ in running], count)
        seconds = time.perf_counter() - begin
        if self._costs is not None and self._model.is_settled:
            self._costs.drafts.observe(len(running), seconds / count)
        for (sequence, followed), tokens in zip(running, drafts, strict=True):
            sequence.drafts = tokens
            if not followed.guess:
                followed.guess = tokens
                followed.kind = MOST_KIND
        return seconds

    def _choose(self, running: list[Followed]) -> int:
        """How many drafts of each sequence bring most tokens a second."""
        num = len(running)
        most = self._most_of(num)
        if self._costs is None:
            return most
        chances = [followed.chances.of(MOST_KIND) for followed in running]
        if num + sum(sum(row[:most]) for row in chances) < GAIN * num:
            return 0  # whatever they cost
        counts = [0, *(count for count in COUNTS if count < most), most]
        seconds = self._costs.steps.seconds([num * (1 + count) for count in counts])
        of_draft = self._costs.of_draft(num, float(seconds[0]))
        rates = [
            (num + sum(sum(row[:count]) for row in chances)) / (float(of_step) + count * of_draft)
            for count, of_step in zip(counts, seconds, strict=True)
        ]
        best = max(range(len(rates)), key=rates.__getitem__)
        return counts[best] if rates[best] >= GAIN * rates[0] else 0
