"""Regular expressions: from JSON Schema's dialect (ECMA-262) to that of Rust's regex crate, which llguidance reads.

The two look alike and differ in silence: Rust's `[a&&b]` is an intersection, its `\\<` the start of a word, its `.`
matches a carriage return. What has no equal (lookaround, backreferences) is refused.
"""

from __future__ import annotations

import math
import re

from octavo.server.message.repetitions import endless_counts

ANY = r"[\s\S]"
NOT_NEWLINE = r"[^\n\r\x{2028}\x{2029}]"
SPACES = r"\t-\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
MAYBE_SPACES = SPACES + r"\x{feff}\x1c-\x1f\x{85}"  # what ECMA-262 alone takes for one, or Python alone
QUANTIFIER = re.compile(r"\{[0-9]+(?:,[0-9]*)?\}")
GROUP = re.compile(r"\((?:\?:|\?P?<[A-Za-z_][A-Za-z0-9_]*>|\?i:|\?i\))?")
CLASS_ESCAPES = frozenset("dDwWpP")
CONTROL = {"n": r"\n", "r": r"\r", "t": r"\t", "f": r"\f", "v": r"\v", "0": r"\x00"}

LEAP_YEAR = r"(?:[0-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{LEAP_YEAR}-02-29)"
)
CLOCK = r"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9]))"
LEAP_SECOND = r"(?:23:59:60(?:\.[0-9]+)?(?:[zZ]|[+-]00:00))"  # those of other time zones aren't generated
TIME = f"(?:{CLOCK}|{LEAP_SECOND})"

LABEL = r"[a-zA-Z0-9](?:-?[a-zA-Z0-9]){0,30}"  # no "--", which begins a name in Punycode
POINTER = r"(?:/(?:[^~/]|~[01])*)*"
PCHAR = r"(?:[a-zA-Z0-9\-._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})"
NO_COLON = r"(?:[a-zA-Z0-9\-._~!$&'()*+,;=@]|%[0-9a-fA-F]{2})"
AUTHORITY = r"(?:[a-zA-Z0-9\-._~!$&'()*+,;=]|%[0-9a-fA-F]{2})*(?::[0-9]*)?"
END_OF_URI = rf"(?:\?(?:{PCHAR}|[/?])*)?(?:#(?:{PCHAR}|[/?])*)?"
RELATIVE = rf"(?://{AUTHORITY}(?:/{PCHAR}*)*|/(?:{PCHAR}+(?:/{PCHAR}*)*)?|{NO_COLON}+(?:/{PCHAR}*)*|){END_OF_URI}"
ABSOLUTE = rf"[a-zA-Z][a-zA-Z0-9+\-.]*:(?://{AUTHORITY}(?:/{PCHAR}*)*|/(?:{PCHAR}+(?:/{PCHAR}*)*)?|{PCHAR}+(?:/{PCHAR}*)*|){END_OF_URI}"
VARIABLE = r"[a-zA-Z0-9_]+(?:\*|:[1-9][0-9]{0,3})?"

# formats that llguidance doesn't know, or takes too loosely, as patterns: the language of the format, or a part of it
# that is plain (names in ASCII, hosts without brackets), since a value that is generated must be valid
FORMAT_PATTERNS = {
    "date": f"^{DATE}$",
    "time": f"^{TIME}$",
    "date-time": f"^{DATE}[tT]{TIME}$",
    "idn-hostname": rf"^{LABEL}(?:\.{LABEL}){{0,3}}$",
    "json-pointer": f"^{POINTER}$",
    "relative-json-pointer": f"^(?:0|[1-9][0-9]*)(?:#|{POINTER})$",
    "uri-reference": f"^(?:{ABSOLUTE}|{RELATIVE})$",
    "iri-reference": f"^(?:{ABSOLUTE}|{RELATIVE})$",
    "iri": f"^{ABSOLUTE}$",
    "uri-template": rf"^(?:{PCHAR}|[/?#]|\{{[+#./;?&]?{VARIABLE}(?:,{VARIABLE})*\}})*$",
}
# those that llguidance takes exactly, or more strictly
FORMATS = {name: name for name in ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")}
FORMATS["idn-email"] = "email"


class PatternError(ValueError):
    """A regular expression that can't be enforced; the message says why."""


def rust_pattern(pattern: str) -> str:
    """The same language in Rust's dialect. Raises PatternError."""
    if counts := endless_counts(pattern):
        raise PatternError(
            f"repetitions of up to {' times '.join(map(str, counts))} stand directly within each other, which takes "
            f"too many states; one of up to {math.prod(counts)} says the same, or something that parts them"
        )
    out: list[str] = []
    position = 0
    while position < len(pattern):
        position = _step(pattern, position, out)
    return "".join(out)


def _step(pattern: str, start: int, out: list[str]) -> int:
    """Translate what begins at `start`; where the next begins."""
    char = pattern[start]
    if char == "\\":
        text, end = _escape(pattern, start, in_class=False)
        out.append(text)
        return end
    if char == "[":
        text, end = _character_class(pattern, start)
        out.append(text)
        return end
    if char == "(":
        group = GROUP.match(pattern, start)
        if group is None or (group[0] == "(" and pattern[start + 1 : start + 2] == "?"):
            raise PatternError(f"{pattern[start : start + 4]!r} (a lookaround or a flag) can't be enforced")
        out.append(group[0])
        return group.end()
    if char == ".":
        out.append(NOT_NEWLINE)
        return start + 1
    if char == "{" and (quantifier := QUANTIFIER.match(pattern, start)):
        out.append(quantifier[0])
        return _after_quantifier(pattern, quantifier.end())
    if char in "*+?":
        out.append(char)
        return _after_quantifier(pattern, start + 1)
    out.append(rf"\x{ord(char):02x}" if char < " " else "\\" + char if char in "{}]" else char)
    return start + 1


def _after_quantifier(pattern: str, position: int) -> int:
    """A lazy quantifier matches the same texts as a greedy one."""
    return position + 1 if pattern[position : position + 1] == "?" else position


def _escape(pattern: str, start: int, *, in_class: bool, negated: bool = False) -> tuple[str, int]:
    """An escape, and where it ends."""
    char = pattern[start + 1 : start + 2]
    if not char:
        raise PatternError("it ends in a backslash")
    after = start + 2
    if char == "s":  # neither \s nor \S matches what validators don't agree on
        return f"[{MAYBE_SPACES if negated else SPACES}]", after
    if char == "S":
        return f"[^{SPACES if negated else MAYBE_SPACES}]", after
    if char in "xu":
        return _code_point(pattern, start)
    if char == "c" and (letter := pattern[after : after + 1]).isascii() and letter.isalpha():
        return f"\\x{ord(letter) % 32:02x}", after + 1
    if char == "b" and in_class:
        return r"\x08", after
    if char in "bB":
        raise PatternError(f"\\{char} (a word boundary) can't be enforced")
    if char in "123456789k":
        raise PatternError(f"\\{char} (a backreference) can't be enforced")
    if char in "pP":
        name = re.compile(r"\{[A-Za-z_=]+\}").match(pattern, after)
        if name is None:
            raise PatternError(f"\\{char} needs the name of a Unicode property in braces")
        return f"\\{char}{name[0]}", name.end()
    if char in CLASS_ESCAPES:
        return "\\" + char, after
    if char in CONTROL:
        return CONTROL[char], after
    if char.isalnum():
        raise PatternError(f"\\{char} is no escape of ECMA-262's")
    return re.escape(char) if char.isascii() and char not in "<>_ " else char, after


def _code_point(pattern: str, start: int) -> tuple[str, int]:
    r"""\xHH, \uHHHH, \u{H...}, and pairs of surrogates."""
    found = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\u\{([0-9a-fA-F]{1,6})\}").match(pattern, start)
    if found is None:
        raise PatternError(f"{pattern[start : start + 6]!r} is no character")
    value = int(found[found.lastindex or 1], 16)
    end = found.end()
    if 0xD800 <= value < 0xDC00 and (low := re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})").match(pattern, end)):
        value = 0x10000 + ((value - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        end = low.end()
    if 0xD800 <= value < 0xE000 or value > 0x10FFFF:
        raise PatternError(f"{found[0]!r} is half of a surrogate pair")
    return f"\\x{{{value:x}}}", end


def _character_class(pattern: str, start: int) -> tuple[str, int]:
    """A class in brackets: what is only a character there in ECMA-262 is escaped."""
    position = start + 1
    out = ["["]
    if pattern[position : position + 1] == "^":
        out.append("^")
        position += 1
    if pattern[position : position + 1] == "]":
        if out == ["[", "^"]:
            return ANY, position + 1
        raise PatternError("[] matches nothing")
    while (char := pattern[position : position + 1]) != "]":
        if not char:
            raise PatternError("a [ isn't closed")
        if char == "\\":
            text, position = _escape(pattern, position, in_class=True, negated=out[1:2] == ["^"])
            out.append(text)
            continue
        out.append(rf"\x{ord(char):02x}" if char < " " else "\\" + char if char in "[&~^" else char)
        position += 1
        if char == "-" and pattern[position : position + 1] == "-":
            out.append("\\-")
            position += 1
    return "".join(out) + "]", position + 1


def literal(text: str) -> str:
    """A regular expression of one text."""
    return "".join(rf"\x{{{ord(char):x}}}" if not char.isalnum() or not char.isascii() else char for char in text)


def other_than(texts: list[str]) -> str:
    """A regular expression of all texts but these."""
    children: dict[str, list[str]] = {}
    for text in texts:
        if text:
            children.setdefault(text[0], []).append(text[1:])
    first = "".join(map(literal, children))
    options = [] if "" in texts else [""]
    options.append(f"[^{first}]{ANY}*" if first else f"{ANY}+")
    options.extend(literal(char) + other_than(rest) for char, rest in children.items())
    return f"(?:{'|'.join(options)})"
