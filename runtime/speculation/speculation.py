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

MOST_KIND = 4  # kinds beyond are the same: drafts hardly get better
DOUBT = 1.5  # of a draft of kind k behind right ones, k : k + DOUBT is the first chance, before anything is known
WEIGHT = 0.2  # of the last guess among a sequence's, in its averages
WEIGHT_FOR_ALL = 0.05  # the same in those that sequences begin with, once they are averages of many
BELIEVED = 2  # guesses, as many as the first chance counts for in these
IDLE = 64  # steps in a row without a draft, after which drafts are looked for behind one step of LOOKS alone
LOOKS = 4


class Text(Protocol):
    """What follows one sequence. kind: how good its last drafts are, as a number from 1 on: the larger the better."""

    kind: int

    def read(self, new: list[int]) -> None:
        """Take the next tokens of prompt and answer."""
        ...

    def drafts(self) -> list[int]:
        """Tokens that may follow, the next one first."""
        ...

    def end(self) -> None:
        """The answer is complete."""
        ...


class Speculates(Protocol):
    """Gives sequences their drafts."""

    def after(self, plan: StepPlan, seconds: float | None) -> None:
        """Give the sequences of a step that has been committed drafts for the next one.

        seconds: that it took; None: others of its size will take less.
        """
        ...


Drafter = Callable[[Sequence], Text]
"""What follows a sequence, of which nothing has been read: who makes drafts."""


class Chances:
    """Of each place in guesses of each kind, the average of how often it and those in front of it were right."""

    __slots__ = ("_begin", "_most", "_num_counted", "_of", "_weight")

    def __init__(self, most: int, weight: float, begin: Chances | None = None) -> None:
        """most: places. weight: of the last guess. begin: whose averages these begin with.

        Where nobody's are, the first guesses have more weight: until there are many, the average is of all of them.
        """
        self._most = most
        self._weight = weight
        self._begin = begin
        self._of: dict[int, list[float]] = {}
        self._num_counted = [0] * (MOST_KIND + 1)  # of each kind

    def of(self, kind: int) -> list[float]:
        kind = min(kind, MOST_KIND)
        found = self._of.get(kind)
        if found is None:
            first = kind / (kind + DOUBT)
            begin = [first ** (place + 1) for place in range(self._most)]
            found = self._of[kind] = begin if self._begin is None else list(self._begin.of(kind))
        return found

    def count(self, kind: int, length: int, num_right: int) -> None:
        """A guess is decided: what stands behind a wrong token is wrong, however long the guess is."""
        kind = min(kind, MOST_KIND)
        chances = self.of(kind)
        weight = self._weight
        if self._begin is None:
            self._num_counted[kind] += 1
            weight = max(weight, 1 / (BELIEVED + self._num_counted[kind]))
        last = length if num_right == length else len(chances)
        for place in range(last):
            chances[place] += weight * ((place < num_right) - chances[place])


class Followed:
    """A sequence, as far as it has been read, and how often guesses of its tokens are right.

    A guess is followed up whether it was checked or not, so that it is known when guessing would pay.
    """

    __slots__ = ("chances", "guess", "kind", "num_read", "num_right")

    def __init__(self, chances: Chances) -> None:
        self.chances = chances
        self.num_read = 0
        self.guess: list[int] = []
        self.kind = 0
        self.num_right = 0

    def read(self, sequence: Sequence, end: int, of_all: Chances) -> list[int]:
        """Take its tokens up to a position, and learn what they say of the guess; returns the new ones."""
        new = sequence.token_ids[self.num_read : end]
        self.num_read += len(new)
        if self.guess and self._judge(new):
            for chances in (self.chances, of_all):
                chances.count(self.kind, len(self.guess), self.num_right)
            self.guess = []
            self.num_right = 0
        return new

    def _judge(self, new: list[int]) -> bool:
        """Compare the guess with what has come; whether that decides it."""
        for token in new:
            if self.num_right == len(self.guess) or token != self.guess[self.num_right]:
                return True
            self.num_right += 1
        return self.num_right == len(self.guess)


class FollowedText(Followed):
    """With the text that its guesses are found in."""

    __slots__ = ("text",)

    def __init__(self, chances: Chances, text: Text) -> None:
        super().__init__(chances)
        self.text = text


class Speculation:
    """Gives sequences drafts that are found in texts. costs: None: all are checked, whatever they cost."""

    def __init__(
        self,
        drafter: Drafter,
        most: int,
        costs: StepCosts | None = None,
        most_of: Callable[[int], int] | None = None,
    ) -> None:
        """most: drafts of a sequence and step; most_of: the same, of steps of so many sequences."""
        self._drafter = drafter
        self._most = most
        self._most_of = most_of
        self._costs = costs
        self._chances = Chances(most, WEIGHT_FOR_ALL)
        self._num_idle = 0  # steps in a row without a draft

    def after(self, plan: StepPlan, seconds: float | None) -> None:
        """As `Speculates.after`."""
        if self._costs is not None and seconds is not None:
            self._costs.take(plan, seconds)
        guessing: list[Sequence] = []
        chances: list[list[float]] = []
        num_running = 0
        looks = self._costs is None or self._num_idle < IDLE or self._num_idle % LOOKS == 0
        self._num_idle += 1
        for it in plan.scheduled:
            sequence = it.sequence
            if sequence.has_ended and sequence.drafting is None:  # a step behind its last one
                continue
            if not looks and not sequence.has_ended:  # what is new is read with the next look
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
                chances.append(followed.chances.of(followed.text.kind)[: len(sequence.drafts)])
                if not followed.guess:
                    followed.guess = sequence.drafts
                    followed.kind = followed.text.kind
        if guessing and self._most_of is not None:
            most = self._most_of(num_running)
            chances = [row[:most] for row in chances]
            for sequence in guessing:
                sequence.drafts = sequence.drafts[:most]
        if guessing and self._costs is not None:
            counts = self._costs.choose(chances, num_running)
            for sequence, count in zip(guessing, counts, strict=True):
                sequence.drafts = sequence.drafts[:count]
        if any(sequence.drafts for sequence in guessing):
            self._num_idle = 0

    def _read(self, sequence: Sequence, end: int) -> FollowedText:
        """Have it followed up to a position, and learn what that says of its guess."""
        followed = sequence.drafting
        if not isinstance(followed, FollowedText):
            chances = Chances(self._most, WEIGHT, self._chances)
            followed = sequence.drafting = FollowedText(chances, self._drafter(sequence))
        followed.text.read(followed.read(sequence, end, self._chances))
        return followed
