r"""A custom tool's Lark grammar as one terminal: of its texts as they are, or as they stand inside a JSON string.

Inside JSON, each control character, quote and backslash has one escape, the shortest. All rules become terminals, since
a lexer could not tell the escape of a line's end from a character of the line before it; so a rule that refers to
itself has no equal here, and is refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from re import _constants as c  # type: ignore[attr-defined] # the parser of Python's own regular expressions
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from octavo.runtime.constraint import GrammarError
from octavo.server.message.patterns import literal

_LAST = 0x10FFFF
_SHORT = {0x22: '\\"', 0x5C: "\\\\", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x08: "\\b", 0x0C: "\\f"}
_ESCAPED = [*range(0x20), 0x22, 0x5C]
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*)
    |(?P<range>"(?:[^"\\\n]|\\.)"\s*\.\.\s*"(?:[^"\\\n]|\\.)")
    |(?P<text>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[imslux]*)
    |%import[ \t]+common\.(?P<imported>[A-Z_]+)[ \t]*(?:->[ \t]*(?P<alias>\w+))?
    |(?P<renamed>->[ \t]*\w+)
    |(?P<head>^[ \t]*[?!]*(?P<rule>[A-Za-z_]\w*)(?:\.-?\d+)?[ \t]*:)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<open>\[)|(?P<close>\])
    |(?P<rest>[\s|()?*+]+|\{[0-9, ]+\})
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_COMMON = {
    "LF": r"\n",
    "CR": r"\r",
    "NEWLINE": r"(?:\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "DIGIT": "[0-9]",
    "INT": "[0-9]+",
    "SIGNED_INT": r"[+-]?[0-9]+",
    "NUMBER": r"[0-9]+(?:\.[0-9]+)?",
    "LETTER": "[A-Za-z]",
    "WORD": "[A-Za-z]+",
    "CNAME": "[A-Za-z_][A-Za-z0-9_]*",
    "HEXDIGIT": "[0-9a-fA-F]",
}
Ranges = list[tuple[int, int]]
_SPACES: Ranges = [(9, 13), (32, 32)]
_DIGITS: Ranges = [(48, 57)]
_WORD: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
_OTHER_SPACES: Ranges = [(0x1C, 0x1F), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)]
_OTHER_SPACES += [(0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]


class InputGrammar:
    """One grammar's rules, under names of their own. text: the rules; start: the name of the terminal."""

    def __init__(self, text: str, prefix: str, *, in_json: bool) -> None:
        """Raises GrammarError for what has no equal."""
        self._prefix = prefix
        self._in_json = in_json
        self._uses: dict[str, set[str]] = {}
        self._rule = ""
        pieces = [self._rewritten(found) for found in _TOKEN.finditer(text)]
        self.lines = [line for line in "".join(pieces).splitlines() if line.strip()]
        self.start = self._named("start")
        missing = {name for used in self._uses.values() for name in used} - set(self._uses)
        if "start" not in self._uses or missing:
            raise GrammarError(f"the rule {min(missing, default='start')!r} is missing")
        self._check_loops()

    def _named(self, name: str) -> str:
        return f"{self._prefix}_{'L' if name.islower() else 'U'}_{name.upper()}"

    def _check_loops(self) -> None:
        clear: set[str] = set()
        while ready := {name for name, used in self._uses.items() if name not in clear and used <= clear}:
            clear |= ready
        if looping := sorted(set(self._uses) - clear):
            raise GrammarError(
                f"the rule {looping[0]!r} refers to itself, or to one that does, which can't be enforced"
            )

    def _rewritten(self, found: re.Match[str]) -> str:
        match found.lastgroup if found["imported"] is None and found["rule"] is None else "definition":
            case "definition" if found["rule"] is not None:
                self._rule = found["rule"]
                self._uses.setdefault(self._rule, set())
                return f"{self._named(self._rule)}:"
            case "definition":
                name = found["alias"] or found["imported"]
                self._uses[name] = set()
                if found["imported"] not in _COMMON:
                    raise GrammarError(f"%import common.{found['imported']}: not known; {', '.join(_COMMON)} are")
                return f"{self._named(name)}: {self._regex(_COMMON[found['imported']], '')}"
            case "comment" | "renamed":
                return ""
            case "name":
                self._uses.setdefault(self._rule, set()).add(found[0])
                return self._named(found[0])
            case "range":
                return self._range(found[0])
            case "text":
                return _text(found[0]) if self._in_json else found[0]
            case "regex":
                end = found[0].rindex("/")
                return self._regex(found[0][1:end].replace("\\/", "/"), found[0][end + 1 :])
            case "open":
                return "("
            case "close":
                return ")?"
            case "rest":
                return found[0]
        raise GrammarError(f"{found[0]!r} can't stand in the grammar of a custom tool's input, behind {self._rule!r}")

    def _range(self, token: str) -> str:
        first, last = (_text_of(part) for part in re.findall(r'"(?:[^"\\\n]|\\.)"', token))
        return f"/{_characters([(ord(first), ord(last))])}/" if self._in_json else token

    def _regex(self, pattern: str, flags: str) -> str:
        if self._in_json:
            return f"/{_pattern(pattern, flags)}/"
        return f"/{pattern.replace('/', chr(92) + '/')}/{flags}"


def _text_of(quoted: str) -> str:
    try:
        text: str = json.loads(quoted)
    except ValueError:
        raise GrammarError(f"{quoted[:80]} is no string") from None
    return text


def _text(token: str) -> str:
    if token.endswith("i"):
        return f"/{_pattern(re.escape(_text_of(token[:-1])), 'i')}/"
    inside = "".join(
        _escape(ord(character)) if ord(character) in _ESCAPED else character for character in _text_of(token)
    )
    return json.dumps(inside)


def _escape(code: int) -> str:
    return _SHORT.get(code, f"\\u{code:04x}")


def _pattern(pattern: str, flags: str) -> str:
    """A regular expression of the escaped texts."""
    if unknown := set(flags) - set("imsux"):
        raise GrammarError(f"the flag {sorted(unknown)[0]!r} of /{pattern[:60]}/ can't be kept")
    value = sum({"i": c.SRE_FLAG_IGNORECASE, "s": c.SRE_FLAG_DOTALL, "x": c.SRE_FLAG_VERBOSE}.get(f, 0) for f in flags)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = parser.parse(pattern, value)
    except (re.error, OverflowError, RecursionError) as error:
        raise GrammarError(f"in the regular expression {pattern[:80]!r} {error}") from None
    return _Pattern(pattern).sequence(tree, tree.state.flags)


class _Pattern:
    """Rewrites one regular expression."""

    def __init__(self, source: str) -> None:
        self._source = source

    def sequence(self, items: Iterable[tuple[Any, Any]], flags: int) -> str:
        """One after the other."""
        return "".join(self._item(op, value, flags) for op, value in items)

    def _item(self, op: Any, value: Any, flags: int) -> str:
        if op is c.LITERAL:
            return _characters(_cased([(value, value)], flags))
        if op is c.NOT_LITERAL:
            return _characters(_complement(_cased([(value, value)], flags)))
        if op is c.ANY:
            return _characters([(0, _LAST)] if flags & c.SRE_FLAG_DOTALL else _complement([(10, 10)]))
        if op is c.IN:
            return _characters(self._set(value, flags))
        if op is c.BRANCH:
            return f"(?:{'|'.join(self.sequence(branch, flags) for branch in value[1])})"
        if op is c.SUBPATTERN:
            _, added, removed, inner = value
            return f"(?:{self.sequence(inner, (flags | added) & ~removed)})"
        if op in (c.MAX_REPEAT, c.MIN_REPEAT):
            least, most, inner = value
            end = "" if most is c.MAXREPEAT else most
            return f"(?:{self.sequence(inner, flags)}){{{least},{end}}}"
        raise GrammarError(f"in the regular expression {self._source[:80]!r} {str(op).lower()} can't be enforced")

    def _set(self, items: list[tuple[Any, Any]], flags: int) -> Ranges:
        negated = bool(items) and items[0][0] is c.NEGATE
        found: Ranges = []
        for op, value in items[1:] if negated else items:
            if op is c.LITERAL:
                found.append((value, value))
            elif op is c.RANGE:
                found.append(value)
            else:
                found += _category(value, is_negated=negated)
        found = _cased(found, flags)
        return _complement(found) if negated else found


def _category(category: Any, *, is_negated: bool) -> Ranges:
    r"""The characters of \d and its like: those of ASCII, as far as that makes nothing match that would not."""
    spaces = _SPACES + (_OTHER_SPACES if is_negated else [])
    known: dict[Any, Ranges] = {
        c.CATEGORY_DIGIT: [*_DIGITS, *([(128, _LAST)] if is_negated else [])],
        c.CATEGORY_WORD: [*_WORD, *([(128, _LAST)] if is_negated else [])],
        c.CATEGORY_SPACE: spaces,
        c.CATEGORY_NOT_SPACE: _complement(_SPACES if is_negated else _SPACES + _OTHER_SPACES),
        c.CATEGORY_NOT_DIGIT: _complement(_DIGITS if is_negated else [*_DIGITS, (128, _LAST)]),
        c.CATEGORY_NOT_WORD: _complement(_WORD if is_negated else [*_WORD, (128, _LAST)]),
    }
    return known[category]


def _cased(ranges: Ranges, flags: int) -> Ranges:
    if not flags & c.SRE_FLAG_IGNORECASE:
        return ranges
    upper = [(max(first, 97) - 32, min(last, 122) - 32) for first, last in ranges if first <= 122 and last >= 97]
    lower = [(max(first, 65) + 32, min(last, 90) + 32) for first, last in ranges if first <= 90 and last >= 65]
    return [*ranges, *upper, *lower]


def _complement(ranges: Ranges) -> Ranges:
    found: Ranges = []
    start = 0
    for first, last in sorted(ranges):
        if first > start:
            found.append((start, first - 1))
        start = max(start, last + 1)
    return [*found, (start, _LAST)] if start <= _LAST else found


def _characters(ranges: Ranges) -> str:
    """One character of these, escaped where it must be."""
    plain = _complement(_complement(ranges) + [(code, code) for code in _ESCAPED] + [(0xD800, 0xDFFF)])
    escaped = [code for code in _ESCAPED if any(first <= code <= last for first, last in ranges)]
    options = [literal(_escape(code)) for code in escaped]
    if plain:
        inside = "".join(
            rf"\x{{{first:x}}}-\x{{{last:x}}}" if first < last else rf"\x{{{first:x}}}" for first, last in plain
        )
        options.insert(0, f"[{inside}]")
    if not options:
        raise GrammarError("a set of characters is empty")
    return options[0] if len(options) == 1 and plain else f"(?:{'|'.join(options)})"
