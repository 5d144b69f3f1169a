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


def _ending(rules: dict[str, Body]) -> set[object]:
    """The rules and groups that some text ends, found from those that need no other."""
    sequences = _sequences(rules)
    users: dict[object, list[int]] = {}
    num_left = []  # of each sequence: what it needs that is not known to end
    for number, (_, needed) in enumerate(sequences):
        num_left.append(len(needed))
        for part in needed:
            users.setdefault(part, []).append(number)
    ending: set[object] = set()
    waiting = [owner for owner, needed in sequences if not needed]
    while waiting:
        found = waiting.pop()
        if found in ending:
            continue
        ending.add(found)
        for number in users.get(found, ()):
            num_left[number] -= 1
            if num_left[number] == 0:
                waiting.append(sequences[number][0])
    return ending


def _sequences(rules: dict[str, Body]) -> list[tuple[object, set[object]]]:
    """Whose alternative each sequence is, a rule's or a group's, and the rules and groups that it needs."""
    found: list[tuple[object, set[object]]] = []

    def add(owner: object, body: Body) -> None:
        for sequence in body:
            needed: set[object] = set()
            for part in sequence:
                if isinstance(part, list):
                    group = object()
                    add(group, part)
                    needed.add(group)
                elif part in rules:
                    needed.add(part)
            found.append((owner, needed))

    for name, body in rules.items():
        add(name, body)
    return found


def _reached(rules: dict[str, Body]) -> list[str]:
    found = dict.fromkeys(["start"])
    waiting = ["start"]
    for name in waiting:
        new = [part for part in dict.fromkeys(_names(rules.get(name, []))) if part not in found]
        found |= dict.fromkeys(new)
        waiting += new
    return waiting


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
