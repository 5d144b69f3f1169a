"""From results to drafts: after each step, what its sequences may say next, and how much of that the next one checks.

Whoever makes drafts (`Drafter`) sees tokens alone. They are never more than guesses: the sampler draws every token as
it would without them (runtime/worker/sampler.py), and the scheduler keeps what was right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from octavo.runtime.scheduling.plan import StepPlan
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.speculation.costs import StepCosts

FIRST_CHANCE = 0.7  # of a draft behind right ones, before anything is known
WEIGHT = 0.2  # of the last guess among a sequence's, in its averages
WEIGHT_FOR_ALL = 0.05  # the same in those that sequences begin with


class Text(Protocol):
    """What follows one sequence."""

    def read(self, new: list[int]) -> None:
        """Take the next tokens of prompt and answer."""
        ...

    def drafts(self) -> list[int]:
        """Tokens that may follow, the next one first."""
        ...

    def end(self) -> None:
        """The answer is complete."""
        ...


Drafter = Callable[[Sequence], Text]
"""What follows a sequence, of which nothing has been read: who makes drafts."""


class _Followed:
    """A sequence's text, and how often its guesses are right.

    chances: of each place in a guess, the average of how often it and those in front of it were right. A guess is
    followed up whether it was checked or not, so that it is known when guessing would pay.
    """

    __slots__ = ("chances", "guess", "num_read", "num_right", "text")

    def __init__(self, text: Text, chances: list[float]) -> None:
        self.text = text
        self.chances = chances
        self.num_read = 0
        self.guess: list[int] = []
        self.num_right = 0

    def judge(self, new: list[int]) -> bool:
        """Compare the guess with what has come; whether that decides it."""
        for token in new:
            if self.num_right == len(self.guess) or token != self.guess[self.num_right]:
                return True
            self.num_right += 1
        return self.num_right == len(self.guess)

    def average(self, chances: list[float], weight: float) -> None:
        """Count the guess, which is decided: what stands behind a wrong token is wrong, however long the guess is."""
        last = len(self.guess) if self.num_right == len(self.guess) else len(chances)
        for place in range(last):
            chances[place] += weight * ((place < self.num_right) - chances[place])


class Speculation:
    """Gives sequences their drafts. costs: None: all of them are checked, whatever they cost."""

    def __init__(self, drafter: Drafter, most: int, costs: StepCosts | None = None) -> None:
        """most: drafts of a sequence and step."""
        self._drafter = drafter
        self._most = most
        self._costs = costs
        self._chances = [FIRST_CHANCE ** (place + 1) for place in range(most)]

    def after(self, plan: StepPlan, seconds: float) -> None:
        """Give the sequences of a step that has been committed, and took so long, drafts for the next one."""
        if self._costs is not None:
            self._costs.take(plan, seconds)
        guessing: list[Sequence] = []
        chances: list[list[float]] = []
        num_running = 0
        for it in plan.scheduled:
            sequence = it.sequence
            if sequence.has_ended and sequence.drafting is None:  # a step behind its last one
                continue
            followed = self._read(sequence, len(sequence.token_ids) if it.wants == "token" else it.end)
            if sequence.has_ended:
                followed.text.end()
                sequence.drafting = None
                continue
            if it.wants != "token":
                continue
            num_running += 1
            sequence.drafts = followed.text.drafts()[: self._most]
            if sequence.drafts:
                guessing.append(sequence)
                chances.append(followed.chances[: len(sequence.drafts)])
                if not followed.guess:
                    followed.guess = sequence.drafts
        if guessing and self._costs is not None:
            counts = self._costs.choose(chances, num_running)
            for sequence, count in zip(guessing, counts, strict=True):
                sequence.drafts = sequence.drafts[:count]

    def _read(self, sequence: Sequence, end: int) -> _Followed:
        """Have it followed up to a position, and learn what that says of its guess."""
        followed = sequence.drafting
        if not isinstance(followed, _Followed):
            followed = sequence.drafting = _Followed(self._drafter(sequence), list(self._chances))
        new = sequence.token_ids[followed.num_read : end]
        followed.num_read += len(new)
        if followed.guess and followed.judge(new):
            followed.average(followed.chances, WEIGHT)
            followed.average(self._chances, WEIGHT_FOR_ALL)
            followed.guess = []
            followed.num_right = 0
        followed.text.read(new)
        return followed
