"""What a program has said: its text or its turns, and its variables. A method is a step, done; nothing waits here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.lang.backend import Context, Generated, Message, content_of
from octavo.lang.choices import ChoicesDecision
from octavo.lang.ir import SHOWN, Gen, Select, value_of
from octavo.lang.reasoning import MARKS


@dataclass(slots=True)
class Said:
    """text, messages, role and images are those of a Context. metas: what the server says of each variable.

    fork_point: (turns, characters of text, images) that a fork has from the program that it began as.
    """

    text: str = ""
    messages: list[Message] = field(default_factory=list)
    role: str | None = None
    images: list[tuple[int, str]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    metas: dict[str, Any] = field(default_factory=dict)
    fork_point: tuple[int, int, int] = (0, 0, 0)
    _scopes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def context(self) -> Context:
        """Where a generation goes on."""
        return Context(self.text, tuple(self.messages), self.role, tuple(self.images))

    def fill(self, text: str) -> None:
        """Append text. Raises ValueError between turns."""
        if text and self.messages and self.role is None:
            raise ValueError(
                f"text stands between turns ({text[:SHOWN]!r}), where no chat template has a place for it: put it into "
                "a turn, such as sgl.user(...)"
            )
        self.text += text

    def show(self, url: str) -> None:
        """Append an image. Raises ValueError outside of a turn."""
        if self.role is None:
            raise ValueError(
                "an image stands outside of a turn: put it into one, such as sgl.user(sgl.image(...) + ...)"
            )
        self.images.append((len(self.text), url))

    def begin_turn(self, role: str) -> None:
        """Raises ValueError within a turn, and behind text that belongs to none."""
        if self.role is not None:
            raise ValueError(f"a turn of role {role!r} begins within one of role {self.role!r}")
        if self.text:
            raise ValueError(
                f"text stands before the first turn ({self.text[:SHOWN]!r}), where no chat template has a place for "
                "it: put it into a turn, such as sgl.system(...)"
            )
        self.role = role

    def end_turn(self, role: str) -> None:
        """Raises ValueError where no such turn is open."""
        if self.role != role:
            there = "none is open" if self.role is None else f"one of role {self.role!r} is open"
            raise ValueError(f"a turn of role {role!r} ends, where {there}")
        self.messages.append({"role": role, "content": content_of(self.text, self.images)})
        self.role = None
        self.text = ""
        self.images = []

    def begin_scope(self, name: str) -> None:
        """From here on, text belongs to this variable too."""
        self._scopes[name] = (len(self.messages), len(self.text))

    def end_scope(self, name: str) -> None:
        """Give the variable its text. Raises ValueError where turns have ended in it."""
        turns, place = self._scopes.pop(name)
        if turns != len(self.messages):
            raise ValueError(f"var_scope({name!r}): a turn ended within it; it takes text of one turn")
        self.variables[name] = self.text[place:]

    def take(self, step: Gen, answer: Generated) -> str:
        """Append what was generated, of several answers the first, and set its variables. Returns what it appended."""
        texts = [value_of(text, step.options) for text in answer.texts]
        if step.reasoning is not None:
            pairs = [
                (meta["reasoning_content"], text) if "reasoning_content" in meta else MARKS[step.reasoning].split(text)
                for text, meta in zip(texts, answer.metas, strict=True)
            ]
            texts = [text for _, text in pairs]
            if step.reasoning_name is not None:
                self.variables[step.reasoning_name] = _one_or_all([thoughts for thoughts, _ in pairs])
        self.fill(texts[0])
        if step.name is not None:
            self.metas[step.name] = _one_or_all(answer.metas)
            self.variables[step.name] = _one_or_all(texts)
        return texts[0]

    def decide(self, step: Select, found: ChoicesDecision) -> None:
        """Append what was chosen."""
        self.fill(found.decision)
        if step.name is not None:
            self.metas[step.name] = found.meta_info
            self.variables[step.name] = found.decision

    def branch(self, variables: dict[str, Any]) -> Said:
        """The same for a fork, which has given these variables values of its own already."""
        return Said(
            text=self.text,
            messages=list(self.messages),
            role=self.role,
            images=list(self.images),
            variables={**self.variables, **variables},
            metas=dict(self.metas),
            fork_point=(len(self.messages), len(self.text), len(self.images)),
            _scopes=dict(self._scopes),
        )

    def gather(self, forks: Sequence[Said]) -> None:
        """Variables that are new in forks, each as the list of its values."""
        known = set(self.variables)
        for fork in forks:
            for name in fork.variables.keys() - known:
                self.variables.setdefault(name, []).append(fork.variables[name])

    def append(self, fork: Said) -> None:
        """What a fork has said since it began. Raises ValueError where that is no whole turns, and no text of one."""
        turns, place, num_images = fork.fork_point
        if len(fork.messages) == turns and fork.role == self.role:
            self.images += [(len(self.text) + at - place, url) for at, url in fork.images[num_images:]]
            self.fill(fork.text[place:])
        elif self.role is None and fork.role is None and not place:
            self.messages += fork.messages[turns:]
        else:
            raise ValueError("join: a fork ended a turn that was open when it began, or left one open")


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
