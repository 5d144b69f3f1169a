"""Rules of a Lark grammar that no text ends: `root: "a" root`. An answer that enters one goes on up to its limit."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|\#[^\n]*|\s+|->[ \t]*\w+|%(?:ignore|llguidance)[^\n]*)
    |(?P<text>"(?:[^"\\\n]|\\.)*"i?|/(?:[^/\\\n]|\\.)+/[imslux]*|\.\.)
    |(?P<imported>%import[ \t]+[\w.]+(?:[ \t]*->[ \t]*(?P<alias>\w+))?)
    |(?P<head>[?!]?(?P<rule>[A-Za-z_]\w*)(?:\.-?\d+)?[ \t]*:)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<count>[?*+]|\{\d*(?:,\d*)?\}|~[ \t]*\d+(?:[ \t]*\.\.[ \t]*\d+)?)
    |(?P<sign>[()\[\]|])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_MAY_BE_NONE = re.compile(r"[?*]|\{0?[,}]|\{0,|~[ \t]*0\b")


class _UnknownError(Exception):
    """A grammar with more than this module reads: it is left to the compiler."""


# alternatives, each a sequence of names, of texts, and of such alternatives in groups
Body = list[list[object]]


def endless_rule(text: str) -> str:
    """The name of a rule that can't end, of those that "start" leads to; "" where there is none."""
    try:
        rules = _read(text)
        ending = _ending(rules)
        reached = _reached(rules)
    except (_UnknownError, RecursionError):
        return ""
    name = next((name for name in reached if name in rules and name not in ending), "")
    seen: set[str] = set()
    while name and name not in seen:  # to one that leads to itself
        seen.add(name)
        name = next(part for part in _names(rules[name]) if part in rules and part not in ending)
    return name


def _ending(rules: dict[str, Body]) -> set[str]:
    """The rules that some text ends, found from those that need no other."""
    ending: set[str] = set()
    waiting = list(rules)
    size = -1
    while size != len(ending):
        size = len(ending)
        waiting.reverse()  # most grammars have their rules from the top down, or from the bottom up
        for name in waiting:
            if _ends(rules[name], ending, rules):
                ending.add(name)
        waiting = [name for name in waiting if name not in ending]
    return ending


def _ends(body: Body, ending: set[str], rules: dict[str, Body]) -> bool:
    return any(
        all(
            _ends(part, ending, rules) if isinstance(part, list) else part in ending or part not in rules
            for part in sequence
        )
        for sequence in body
    )


def _reached(rules: dict[str, Body]) -> list[str]:
    found = ["start"]
    for name in found:
        found += [part for part in dict.fromkeys(_names(rules.get(name, []))) if part not in found]
    return found


def _names(body: Body) -> Iterator[str]:
    for sequence in body:
        for part in sequence:
            if isinstance(part, list):
                yield from _names(part)
            else:
                yield str(part)


def _read(text: str) -> dict[str, Body]:
    rules: dict[str, Body] = {}
    groups: list[Body] = [[[]]]
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup if token["rule"] is None and token["imported"] is None else "special"
        match kind:
            case "special" if token["rule"] is not None:
                groups = [[[]]]
                rules[token["rule"]] = groups[0]
            case "text" | "name":
                groups[-1][-1].append(token[0])
            case "count" if groups[-1][-1]:
                if _MAY_BE_NONE.match(token[0]):
                    groups[-1][-1][-1] = [[]]
            case "sign":
                _sign(token[0], groups)
            case "skip" | "special":
                pass
            case _:
                raise _UnknownError
    return rules


def _sign(sign: str, groups: list[Body]) -> None:
    if sign in "([":
        groups.append([[]])
    elif sign == "|":
        groups[-1].append([])
    elif len(groups) > 1:
        group: Body = groups.pop()
        groups[-1][-1].append([*group, []] if sign == "]" else group)
    else:
        raise _UnknownError
