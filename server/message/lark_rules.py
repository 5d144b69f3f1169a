"""Lark in pieces: rules with names of their own, and the expressions that grammars of calls and tags are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from octavo.runtime.constraint import GrammarError
from octavo.server.message.patterns import literal

MAX_RULES = 5000


class Rules:
    """The rules of one grammar, and other grammars that they name with `@`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.grammars: list[dict[str, Any]] = []
        self._named: dict[tuple[str, bool, bool], str] = {}

    def __call__(self, body: str, *, terminal: bool = False, lazy: bool = False) -> str:
        """Add a rule; its name. The same rule is not added twice."""
        key = (body, terminal, lazy)
        if key not in self._named:
            if len(self.lines) > MAX_RULES:
                raise GrammarError(f"it has more than {MAX_RULES} parts")
            name = f"{'T' if terminal else 'r'}{len(self.lines)}"
            self.lines.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
            self._named[key] = name
        return self._named[key]

    @property
    def space(self) -> str:
        """Whitespace, or none."""
        return self(r"/[ \t\n\r]{0,40}/", terminal=True)


def quoted(text: str) -> str:
    """A text as it stands."""
    return json.dumps(text)


def either(options: Sequence[str]) -> str:
    """One of these."""
    return f"({' | '.join(options)})"


def without(*parts: Sequence[str]) -> str:
    """A terminal of all texts in which none of these occurs."""
    texts = [text for part in parts for text in part]
    return " & ".join([r"/(?s:.*)/", *(rf"~/(?s:.*){literal(text)}(?s:.*)/" for text in texts)])
