"""The sampler's share of constrained answers: which tokens their grammars allow next, and how far each one is."""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.runtime.constraint import FAILED, Grammar
from octavo.runtime.following import Masks, Progress
from octavo.runtime.scheduling.plan import ScheduledSequence
from octavo.runtime.scheduling.sequence import Sequence

TOO_COMPLEX = (
    f"{FAILED} can't be followed any further ({{}}); shorter repetitions within each other, or fewer rules that refer "
    "to themselves, work"
)


@dataclass(frozen=True, slots=True)
class Constrained:
    """The constrained sequences of one step: their places among those that sample, and how far they are.

    mask  rows and bits as `sampling.reference.forbid` takes them; None where no grammar holds
    """

    places: list[int]
    progress: list[Progress]
    mask: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Ends:
    """By place: which answers are complete now, which of them without the token of this step, and what went wrong.

    jumped: tokens behind that of this step, which the grammar allows no choice of
    """

    complete: set[int] = field(default_factory=set)
    without_token: set[int] = field(default_factory=set)
    jumped: dict[int, list[int]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class GrammarMasks:
    """Follows the grammars of all running sequences. Call `before` and `after` once in each step.

    jumps: whether tokens that a grammar forces are taken at once, without a step for each.
    """

    def __init__(self, device: torch.device, *, jumps: bool = False) -> None:
        self._device = device
        self._jumps = jumps
        self._masks: Masks | None = None  # made at the first use: it knows the vocabulary's size then
        self._progress: dict[int, tuple[Sequence, Progress]] = {}  # by slot

    def before(self, sampling: Rows[ScheduledSequence], rows: Rows[int], vocab: int) -> Constrained:
        """What the next tokens have to obey; rows[i] is the row of logits of sampling[i]."""
        places = [i for i, it in enumerate(sampling) if it.sequence.params.constraint is not None]
        progress = [self._of(sampling[i]) for i in places]
        holding = [(place, each) for place, each in zip(places, progress, strict=True) if each.holds]
        if not holding:
            return Constrained(places, progress)
        if self._masks is None:
            self._masks = Masks(vocab)
        bits = self._masks.fill([each for _, each in holding])
        for row, (place, each) in zip(bits, holding, strict=True):
            each.allow_ends(row, sampling[place].sequence.params.stop_token_ids)
        masked = torch.tensor([rows[place] for place, _ in holding], device=self._device)
        return Constrained(places, progress, (masked, torch.from_numpy(bits).to(self._device)))

    def after(
        self,
        constrained: Constrained,
        sampling: Rows[ScheduledSequence],
        chosen: Rows[int],
        stuck: Container[int],
    ) -> Ends:
        """Go on by the chosen tokens. stuck: the places where nothing was allowed, which may be right where it ends."""
        ends = Ends()
        for place, progress in zip(constrained.places, constrained.progress, strict=True):
            if progress.error:  # of its mask, which then allows nothing
                ends.errors[place] = TOO_COMPLEX.format(progress.error)
                continue
            if progress.is_over:  # by a token that the scheduler did not know of when it planned this step
                continue
            if place in stuck:
                if progress.is_complete:
                    ends.complete.add(place)
                    ends.without_token.add(place)
            elif chosen[place] not in sampling[place].sequence.params.stop_token_ids:
                progress.accept(chosen[place])
                if self._jumps and (jumped := _jump(progress, sampling[place])):
                    ends.jumped[place] = jumped
                if progress.is_over:
                    ends.complete.add(place)
            if progress.error:
                ends.errors[place] = TOO_COMPLEX.format(progress.error)
        return ends

    def is_over(self, it: ScheduledSequence) -> bool:
        """Whether the grammar of a sequence allows nothing after the token that was sampled last."""
        sequence, progress = self._progress.get(it.slot, (None, None))
        return progress is not None and sequence is it.sequence and progress.is_over

    def _of(self, it: ScheduledSequence) -> Progress:
        """How far the answer is before this step's token: told token by token, or read anew in another slot."""
        sequence, progress = self._progress.get(it.slot, (None, None))
        if progress is None or sequence is not it.sequence or progress.num_tokens != it.num_outputs:
            constraint = it.sequence.params.constraint
            grammar = it.sequence.grammar
            assert constraint is not None
            assert grammar is None or isinstance(grammar, Grammar)
            begin = it.sequence.num_prompt
            progress = Progress(constraint, grammar, it.sequence.token_ids[begin : begin + it.num_outputs])
            self._progress[it.slot] = (it.sequence, progress)
        return progress


def _jump(progress: Progress, it: ScheduledSequence) -> list[int]:
    """The forced tokens behind the one that was just taken, as many as the answer may still have."""
    params = it.sequence.params
    return progress.jump(params.max_tokens - it.num_outputs - 1) if params.may_jump else []
