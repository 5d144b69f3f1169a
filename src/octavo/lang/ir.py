"""What programs are made of: expressions as values, joined by `+`, and the options of a generation.

It runs nothing and knows no server. An option that is None asks for nothing, and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import msgspec

from octavo.lang.choices import ChoicesSamplingMethod

SHOWN = 40  # characters of an address or a text that is repeated
REGEX_INT = r"[-+]?[0-9]+[ \n]*"
REGEX_FLOAT = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
REGEX_BOOL = r"(True|False)"
REGEX_STR = r'"[^"\\\x00-\x1f]*"'


class Form(NamedTuple):
    """A dtype: the regex that is asked for, the stop_regex that ends the text, and what of the text is its value.

    A number ends where the model goes on to anything else. Were white space alone allowed behind it, a model that wants
    to write a full stop or a word would have to write digits until max_tokens. A comma does not end one: 1,000 is 1000.
    """

    regex: str
    end: str | None = None
    value: str | None = None


DTYPES = {
    "int": Form(r"[-+]?[0-9]+([^0-9,][\s\S]*)?", "[^-+0-9]", "[-+]?[0-9]+"),
    "float": Form(r"[-+]?[0-9]*\.?[0-9]+([^0-9.,][\s\S]*)?", "[^-+.0-9]", r"[-+]?[0-9]*\.?[0-9]+"),
    "bool": Form(REGEX_BOOL),
    "str": Form(REGEX_STR),
}

Options = dict[str, Any]
"""What a generation is asked for, under the names of SamplingOptions, without what is left out."""


class RunOptions(TypedDict, total=False):
    """What `run` and `run_batch` take for all generations of a program, in SGLang's words."""

    max_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    ignore_eos: bool | None
    return_logprob: bool | None
    logprob_start_len: int | None
    top_logprobs_num: int | None
    return_text_in_logprobs: bool | None


class StringOptions(TypedDict, total=False):
    """What `gen_int` and `gen_string` take beside a name, max_tokens, n and stop."""

    stop_token_ids: Sequence[int] | None
    stop_regex: str | Sequence[str] | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    ignore_eos: bool | None
    return_logprob: bool | None
    logprob_start_len: int | None
    top_logprobs_num: int | None
    return_text_in_logprobs: bool | None


class GenOptions(StringOptions, total=False):
    """What `gen` takes beside them. json_schema: an object, or one as a string."""

    dtype: type | str | None
    regex: str | None
    json_schema: str | Mapping[str, Any] | None


class SamplingOptions(RunOptions, total=False):
    """All of them."""

    min_new_tokens: int | None
    n: int | None
    stop_regex: str | Sequence[str] | None
    dtype: str | None
    regex: str | None
    json_schema: str | Mapping[str, Any] | None


DEFAULTS: Options = {"max_new_tokens": 128, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
"""SGLang's, which a server's own defaults don't replace."""
RUN_OPTIONS = frozenset(RunOptions.__annotations__)
GEN_OPTIONS = frozenset({*StringOptions.__annotations__, *GenOptions.__annotations__})
CONSTRAINTS = ("dtype", "regex", "json_schema")


def checked(given: Mapping[str, Any], caller: str) -> Options:
    """The options without those that are None. Raises TypeError and ValueError, which name the one to blame."""
    found = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(set(found) - set(RUN_OPTIONS | GEN_OPTIONS | {"min_new_tokens", "n"}))
    if unknown:
        raise TypeError(f"{caller} has no option {unknown[0]!r}; it has {', '.join(sorted(GEN_OPTIONS))}")
    both = [name for name in CONSTRAINTS if name in found]
    if len(both) > 1:
        raise ValueError(f"{caller}: {' and '.join(both)} both say what the text must be; give one of them")
    if "dtype" in found:
        found["dtype"] = _dtype_name(found["dtype"], caller)
    if "regex" in found:
        re.compile(found["regex"])
    if isinstance(found.get("json_schema"), str):
        json.loads(found["json_schema"])
    for name, value in found.items():
        if isinstance(value, tuple | set | frozenset):
            found[name] = list(value)
    try:
        msgspec.convert(found, SamplingOptions, strict=True)
    except msgspec.ValidationError as error:
        raise TypeError(f"{caller}: {error}") from None
    return found


def _dtype_name(value: object, caller: str) -> str:
    name = value.__name__ if isinstance(value, type) else value
    if name == "string":
        return "str"
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{caller}: dtype {name!r} is none of {', '.join(DTYPES)}; a regex says anything else")
    return name


def resolved(defaults: Options, given: Options) -> Options:
    """A generation's options over those of its program, a dtype written as a regex with another one that ends it."""
    found = {**defaults, **given}
    dtype = found.pop("dtype", None)
    if dtype is not None:
        form = DTYPES[dtype]
        found["regex"] = form.regex
        if form.end is not None:
            others = found.get("stop_regex") or []
            found["stop_regex"] = [*([others] if isinstance(others, str) else others), form.end]
    return found


def value_of(text: str, options: Options) -> str:
    """Of a generated text, what is the value: of a number, without what the model went on to."""
    form = DTYPES.get(options.get("dtype", ""))
    found = None if form is None or form.value is None else re.match(form.value, text)
    return text if found is None else found[0]


class Expression:
    """A part of a program's text. `+` joins it with others and with strings."""

    __slots__ = ()

    def __add__(self, other: object) -> Joined:
        return Joined((*parts_of(self), *parts_of(other)))

    def __radd__(self, other: object) -> Joined:
        return Joined((*parts_of(other), *parts_of(self)))

    def __format__(self, spec: str) -> str:
        raise TypeError(f"{self!r} stands in an f-string, which would write down its name: join it with +")


@dataclass(frozen=True, slots=True)
class Joined(Expression):
    """Several, one behind the other."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Text(Expression):
    """Text as it is."""

    value: str


@dataclass(frozen=True, slots=True)
class Image(Expression):
    """A picture in a turn. url: `data:` with its bytes, or an address that the server may read."""

    url: str

    def __repr__(self) -> str:
        return f"Image({self.url[:SHOWN]!r}...)" if len(self.url) > SHOWN else f"Image({self.url!r})"


@dataclass(frozen=True, slots=True)
class Gen(Expression):
    """Text that the model writes. reasoning: whose form of thoughts is to be taken out of it, or None."""

    name: str | None
    options: Options
    reasoning: str | None = None

    @property
    def reasoning_name(self) -> str | None:
        """The variable of its thoughts."""
        return None if self.name is None or self.reasoning is None else f"{self.name}_reasoning_content"


@dataclass(frozen=True, slots=True)
class Select(Expression):
    """The choice that the model finds likeliest."""

    name: str | None
    choices: tuple[str, ...]
    method: ChoicesSamplingMethod


@dataclass(frozen=True, slots=True)
class RoleBegin(Expression):
    """Where a turn begins."""

    role: str


@dataclass(frozen=True, slots=True)
class RoleEnd(Expression):
    """Where it ends."""

    role: str


@dataclass(frozen=True, slots=True)
class ScopeBegin(Expression):
    """Where the text begins that a variable is to have."""

    name: str


@dataclass(frozen=True, slots=True)
class ScopeEnd(Expression):
    """Where it ends."""

    name: str


def parts_of(value: object) -> tuple[Expression, ...]:
    """What was appended, as a row of expressions. Raises TypeError."""
    match value:
        case str():
            return (Text(value),)
        case Joined(parts):
            return parts
        case Expression():
            return (value,)
        case list():
            raise TypeError("a list was appended: a gen with n has a list of n texts, of which one can be appended")
        case _:
            raise TypeError(f"{type(value).__name__} was appended; text and expressions such as gen(...) can be")


def joined(parts: Iterable[Expression]) -> Expression:
    """A row of expressions as one."""
    return Joined(tuple(parts))


def writes(step: object) -> tuple[str, ...]:
    """The variables that an expression gives a value."""
    match step:
        case Gen(name):
            return tuple(each for each in (name, step.reasoning_name) if each is not None)
        case Select(name) if name is not None:
            return (name,)
        case ScopeEnd(name):
            return (name,)
    return ()
