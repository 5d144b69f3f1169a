"""Regexes out of a checkpoint's config, matched against layer names in a time that no regex can stretch.

Python's `re` backtracks: `(a+)+$` takes it hours on a name of 40 letters. RE2's time grows linearly with the name. It
has no lookaround, backreferences or atomic groups; lookaheads at the beginning, as in `^(?!.*lm_head).*proj$`, are
matched as regexes of their own, and whatever else RE2 doesn't take is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import re2

from octavo.quant.formats.format import FormatError
from octavo.quant.printable import shown

MAX_LENGTH = 100_000  # characters of all regexes in one list; a model's longest list has some 2,000
LEADING_FLAGS = re.compile(r"\(\?[ims]+\)")
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False  # RE2 writes them to stderr otherwise
_OPTIONS.never_capture = True


class Regexes:
    """Some regexes of one list. `key` is where the config, or another file, has them, for messages."""

    def __init__(self, patterns: Iterable[str], key: str, file: str = "quantization_config") -> None:
        """Raises FormatError, which names the pattern, for one that RE2 doesn't take."""
        patterns = tuple(dict.fromkeys(patterns))
        key = f"{file}: {key}"
        length = sum(map(len, patterns))
        if length > MAX_LENGTH:
            raise FormatError(f"{key} has {length:,} characters of regexes; at most {MAX_LENGTH:,} are matched")
        split = [_split_lookaheads(pattern) for pattern in patterns]
        plain = [pattern for pattern, parts in zip(patterns, split, strict=True) if parts is None]
        self._guarded = [
            _Guarded(
                wanted=tuple(_compile(body, pattern, key) for body, negated in parts.lookaheads if not negated),
                unwanted=tuple(_compile(body, pattern, key) for body, negated in parts.lookaheads if negated),
                rest=_compile(parts.rest, pattern, key),
                anchored=parts.anchored,
            )
            for pattern, parts in zip(patterns, split, strict=True)
            if parts is not None
        ]
        self._plain = _joined([_compile(pattern, pattern, key) for pattern in plain])

    def match(self, name: str) -> bool:
        """Whether a regex matches from the beginning of `name`, as `re.match` does."""
        return any(regex.match(name) for regex in self._plain) or any(regex.match(name) for regex in self._guarded)

    def search(self, name: str) -> bool:
        """Whether a regex matches anywhere in `name`, as `re.search` does."""
        return any(regex.search(name) for regex in self._plain) or any(regex.search(name) for regex in self._guarded)


@dataclass(frozen=True)
class _Parts:
    """A regex in pieces: (body, negated) of each lookahead at its beginning, and the rest."""

    lookaheads: tuple[tuple[str, bool], ...]
    rest: str
    anchored: bool


@dataclass(frozen=True)
class _Guarded:
    """A regex with lookaheads at its beginning. A lookahead matches where the rest begins to, and takes nothing."""

    wanted: tuple[Any, ...]
    unwanted: tuple[Any, ...]
    rest: Any
    anchored: bool

    def match(self, name: str) -> bool:
        if not self.rest.match(name) or any(regex.match(name) for regex in self.unwanted):
            return False
        return all(regex.match(name) for regex in self.wanted)

    def search(self, name: str) -> bool:
        return self.match(name) if self.anchored else any(self.match(name[i:]) for i in range(len(name) + 1))


def _compile(regex: str, pattern: str, key: str) -> Any:
    """`regex` is `pattern`, or a piece of it."""
    try:
        return re2.compile(regex, options=_OPTIONS)
    except UnicodeEncodeError as e:
        raise FormatError(f"{key} {shown(pattern)} is not a regex: {e.reason}") from None
    except re2.error as e:
        reason = e.args[0].decode(errors="replace")
        raise FormatError(
            f"{key} {shown(pattern)} is not a regex that RE2 takes ({reason}); without "
            "backreferences, and with lookaheads at the beginning alone, no regex can hang octavo"
        ) from None


def _joined(compiled: list[Any]) -> list[Any]:
    """One regex that matches where any does: a name is walked once. As they are, if together RE2 refuses them."""
    if len(compiled) < 2:
        return compiled
    try:
        return [re2.compile("|".join(f"(?:{regex.pattern})" for regex in compiled), options=_OPTIONS)]
    except re2.error:  # two groups of one name, say
        return compiled


def _split_lookaheads(pattern: str) -> _Parts | None:
    """The pieces of a regex that begins with lookaheads; None for any other."""
    flags = LEADING_FLAGS.match(pattern)
    prefix = flags[0] if flags else ""
    rest = pattern.removeprefix(prefix)
    anchored = rest.startswith("^")
    rest = rest.removeprefix("^")
    lookaheads = []
    while rest.startswith(("(?=", "(?!")):
        end = next((i for i, _ in _top_level(rest)), None)
        if end is None:
            return None
        lookaheads.append((prefix + rest[3:end], rest[2] == "!"))
        rest = rest[end + 1 :]
    if not lookaheads or any(c == "|" for _, c in _top_level(rest)):
        return None  # `(?!a)b|c` guards b alone
    return _Parts(tuple(lookaheads), prefix + rest, anchored)


def _top_level(regex: str) -> Iterator[tuple[int, str]]:
    """Each `)` that closes an outermost group, and each `|` outside of groups, with its place."""
    depth = 0
    i = 0
    while i < len(regex):
        c = regex[i]
        if c == "\\":
            i += 1
        elif c == "[":
            i = _end_of_class(regex, i)
        elif c == "(":
            depth += 1
        elif c == ")":
            depth -= 1
            if depth == 0:
                yield i, c
        elif c == "|" and depth == 0:
            yield i, c
        i += 1


def _end_of_class(regex: str, begin: int) -> int:
    """The place of the `]` that ends the character class at `begin`; a `]` that comes first is a member."""
    i = begin + 1
    if regex[i : i + 1] == "^":
        i += 1
    i += 1
    while i < len(regex) and regex[i] != "]":
        i += 2 if regex[i] == "\\" else 1
    return i
