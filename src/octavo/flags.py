"""Command-line flags made of annotated structs, so that an option is stated once.

    class Load(msgspec.Struct, frozen=True):
        num_prompts: Annotated[int, Meta(ge=1, description="requests", extra={"metavar": "N"})] = 1000

The field's type, default and `msgspec.Meta` are the flag, its check, its help and its documentation: `flags_of` lists
the flags of structs, `add_flags` gives them to argparse, `read` builds a struct from what was given on the command
line, and `markdown` writes the table for docs/. A field without a description has no flag. Imports nothing of octavo.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Union, cast, get_args, get_origin

import msgspec

S = TypeVar("S", bound=msgspec.Struct)
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


class Option(TypedDict, total=False):
    """The keys of `Meta.extra`, for what the type, the bounds, the description and the default don't say.

    flag        the flag, or several; default: '--' and the field's name. '--no-...' sets the field to False
    aliases     other names, which --help doesn't show
    positional  an argument without a name; one that has a default may be left out
    group       the heading in --help and docs, for this field and those after it; '' for none
    metavar     the placeholder of the value
    default     what the default means, where the value doesn't say it; '' for nothing
    what        what the value must be, for the error: 'a number of tokens from 2 up'
    choices     the values that are accepted, where the type isn't a Literal
    spellings   other spellings of a value, and the value that each one means
    parse       makes the value from one word; raises ValueError
    parse_each  the same for each word of a list
    """

    flag: str | tuple[str, ...]
    aliases: tuple[str, ...]
    positional: bool
    group: str
    metavar: str
    default: str
    what: str
    choices: Iterable[Any]
    spellings: Mapping[str, str]
    parse: Callable[[str], Any]
    parse_each: Callable[[str], Any]


@dataclass(frozen=True)
class Flag:
    """One option of a command. names: as --help shows them; empty for a positional argument."""

    field: str
    names: tuple[str, ...]
    aliases: tuple[str, ...]
    group: str | None
    description: str
    default: str
    arguments: Mapping[str, Any]  # of argparse's add_argument

    @property
    def help(self) -> str:
        """The description with the default, as argparse wants it."""
        text = f"{self.description} (default: {self.default})" if self.default else self.description
        return text.replace("%", "%%")


def flags_of(*structs: type[msgspec.Struct]) -> list[Flag]:
    """The flags of all fields that have a description: by heading, under each one in the order of the fields."""
    flags = [flag for struct in structs for flag in _flags(struct)]
    groups = list(dict.fromkeys([None, *(flag.group for flag in flags)]))
    return sorted(flags, key=lambda flag: groups.index(flag.group))


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """Add flags under their headings. A flag that isn't given leaves nothing in the namespace; see `read`."""
    groups: dict[str | None, Any] = {None: parser}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        owner = groups[flag.group]
        common = {**flag.arguments, "default": argparse.SUPPRESS}
        if not flag.names:
            owner.add_argument(flag.field, help=flag.help, **common)
            continue
        owner.add_argument(*flag.names, dest=flag.field, help=flag.help, **common)
        for alias in flag.aliases:
            owner.add_argument(alias, dest=flag.field, help=argparse.SUPPRESS, **{**common, "required": False})


def read(struct: type[S], args: argparse.Namespace, **values: Any) -> S:
    """The struct that the flags mean; `values` are fields that no flag gives, or that win over their flag."""
    given = vars(args) | values
    found = {field.name: given[field.name] for field in _fields(struct) if field.name in given}
    defaults = {field.name: field.default for field in _fields(struct)}
    return struct(**{k: tuple(v) if isinstance(defaults[k], tuple) else v for k, v in found.items()})


def check_bounds(options: msgspec.Struct) -> None:
    """Raise ValueError for a number that is out of its field's bounds, which flags check by themselves."""
    for field in _fields(type(options)):
        value = getattr(options, field.name)
        meta = _meta(field.type)
        if meta is None or not isinstance(value, int | float):
            continue
        bounds = _bounds(field.type, meta)
        if not _within(value, bounds):
            raise ValueError(f"{field.name} {value:g} is not {_in_words(_plain(field.type)[0], bounds)}")


def given(args: argparse.Namespace, flags: Iterable[Flag]) -> list[str]:
    """The flags among these that stand on the command line, by their first names."""
    return [flag.names[0] for flag in flags if flag.names and flag.field in vars(args)]


def markdown(flags: Iterable[Flag]) -> str:
    """The options as Markdown tables, one for each group."""
    lines: list[str] = []
    group: str | None = ""
    for flag in flags:
        if flag.group != group:
            group = flag.group
            lines += [f"\n**{group}**\n"] if group else [""]
            lines += ["| option | default | what it does |", "|---|---|---|"]
        value = str(flag.arguments.get("metavar") or "")
        if choices := flag.arguments.get("choices"):
            value = "{" + ",".join(map(str, choices)) + "}"
        names = f"{', '.join(flag.names)} {value}".strip() or flag.field.upper()
        also = f" (also {', '.join(f'`{alias}`' for alias in flag.aliases)})" if flag.aliases else ""
        cells = (f"`{names}`{also}", flag.default, flag.description)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines).strip() + "\n"


def parse_size(text: str) -> int:
    """'5GB' in bytes, with the units that transformers has. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = SIZES.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)


def parse_count(text: str) -> int:
    """'4k' is 4000, '4K' 4096, as in vLLM; also m, M, g, G. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    factor = COUNTS[match[2]] if match else 0
    count = float(match[1]) * factor if match else 0.0
    if count < 1 or not count.is_integer():
        raise ValueError(f"{text!r} is not a whole number from 1 up, such as 4096, 4k (4000) or 4K (4096)")
    return int(count)


def parse_pair(text: str) -> tuple[str, str]:
    """'NAME=VALUE'. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"{text!r} is not NAME=VALUE")
    return name.strip(), value.strip()


def parse_json_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.ValidationError:
        raise ValueError(f"{text} is not a JSON object") from None
    except msgspec.DecodeError as e:
        raise ValueError(f"{text} is not JSON: {e}") from None


def configuration(struct: type[S], what: str) -> Callable[[str], S]:
    """A parser of a struct in JSON, which is a configuration of `what`; it raises ValueError."""

    def parse(text: str) -> S:
        try:
            return msgspec.json.decode(text, type=struct)
        except msgspec.DecodeError as error:
            raise ValueError(f"{text} is no configuration of {what}: {error}") from None

    return parse


def number(kind: type[int | float], meta: msgspec.Meta | None = None, what: str = "") -> Callable[[str], Any]:
    """A parser of numbers of this type within the bounds of `meta`; it raises ValueError."""
    bounds = meta or msgspec.Meta()
    wanted = what or _in_words(kind, bounds)

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not _within(value, bounds):
            raise ValueError(f"{text!r} is not {wanted}")
        return value

    return parse


def _within(value: float, bounds: msgspec.Meta) -> bool:
    return not math.isnan(value) and not (
        (bounds.ge is not None and value < bounds.ge)
        or (bounds.gt is not None and value <= bounds.gt)
        or (bounds.le is not None and value > bounds.le)
        or (bounds.lt is not None and value >= bounds.lt)
    )


def _in_words(kind: type[int | float], bounds: msgspec.Meta) -> str:
    """'a whole number from 1 to 8'."""
    words = ["a whole number" if kind is int else "a number"]
    if bounds.gt is not None:
        words.append(f"above {_digits(bounds.gt)}")
    if bounds.ge is not None:
        words.append(f"from {_digits(bounds.ge)}" + (" up" if bounds.le is None and bounds.lt is None else ""))
    if bounds.le is not None:
        words.append(f"{'to' if bounds.ge is not None else 'up to'} {_digits(bounds.le)}")
    if bounds.lt is not None:
        words.append(f"{'to' if bounds.ge is not None else ''} below {_digits(bounds.lt)}".strip())
    return " ".join(words)


def _digits(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


@cache
def _fields(struct: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Kept, since msgspec evaluates all annotations each time, and a start waits for it."""
    return msgspec.structs.fields(struct)


def _flags(struct: type[msgspec.Struct]) -> Iterable[Flag]:
    group: str | None = None
    for field in _fields(struct):
        meta = _meta(field.type)
        if meta is None or meta.description is None:
            continue
        option = cast(Option, meta.extra or {})
        if unknown := option.keys() - Option.__annotations__.keys():
            raise TypeError(f"{struct.__name__}.{field.name}: unknown keys of an option: {', '.join(sorted(unknown))}")
        group = option.get("group", group) or None
        names = option.get("flag", "--" + field.name.replace("_", "-"))
        names = () if option.get("positional") else (names,) if isinstance(names, str) else names
        default = None if field.required else _default(field)
        yield Flag(
            field=field.name,
            names=names,
            aliases=option.get("aliases", ()),
            group=group,
            description=meta.description,
            default=option.get("default", _default_text(default)),
            arguments=_arguments(field.type, meta, option, names, field.required, default),
        )


def _meta(hint: Any) -> msgspec.Meta | None:
    """The annotation of a field; None if it has none."""
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, msgspec.Meta)), None)


def _default(field: Any) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def _default_text(default: Any) -> str:
    """A default in words; nothing for None, False, and what is empty."""
    if default is True:
        return "on"
    if isinstance(default, list | tuple):
        return ",".join(map(str, default))
    return "" if default is None or default is False or default in ("", {}) else str(default)


def _arguments(
    hint: Any, meta: msgspec.Meta, option: Option, names: tuple[str, ...], required: bool, default: Any
) -> dict[str, Any]:
    """What argparse is told of a field besides its names, help and default."""
    plain, optional = _plain(hint)
    if plain is bool:
        return {"action": _bool_action(names, optional or default is True)}
    found: dict[str, Any] = {"required": True} if names and required else {}
    if not names and not required:
        found["nargs"] = "?"
    if "metavar" in option:
        found["metavar"] = option["metavar"]
    parse = option.get("parse")
    if parse is None and get_origin(plain) in (list, tuple):
        plain = get_args(plain)[0]
        parse = option.get("parse_each")
        found |= {"nargs": "+", "action": "extend"}
    spellings = option.get("spellings", {})
    choices = option.get("choices", get_args(plain) if get_origin(plain) is Literal else None)
    if choices is not None:
        found["choices"] = tuple(dict.fromkeys((*choices, *spellings)))
        plain = type(found["choices"][0])
    if parse is None and plain in (int, float):
        parse = number(plain, _bounds(hint, meta), option.get("what", ""))
    found["type"] = _word(parse or (Path if plain is Path else str), spellings)
    return found


def _plain(hint: Any) -> tuple[Any, bool]:
    """A type without its annotations and without None, and whether None was in it."""
    hint = _bare(hint)
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    others = [kind for kind in get_args(hint) if kind is not NoneType]
    return _bare(others[0]), len(others) < len(get_args(hint))


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _bounds(hint: Any, meta: msgspec.Meta) -> msgspec.Meta:
    """The annotation with a number's bounds: its own in `Annotated[int, Meta(ge=1)] | None`, which msgspec can decode.

    msgspec takes no bounds of a union in an annotation around it.
    """
    kinds = get_args(_bare(hint)) if get_origin(_bare(hint)) in (Union, UnionType) else ()
    inner = [m for kind in kinds for m in getattr(kind, "__metadata__", ()) if isinstance(m, msgspec.Meta)]
    return inner[0] if inner else meta


def _bool_action(names: tuple[str, ...], both_ways: bool) -> Any:
    if names[0].startswith("--no-"):
        return "store_false"
    return argparse.BooleanOptionalAction if both_ways else "store_true"


def _word(parse: Callable[[str], Any], spellings: Mapping[str, str]) -> Callable[[str], Any]:
    """What argparse calls with a word: a ValueError's message reaches the user."""

    def convert(text: str) -> Any:
        try:
            return parse(spellings.get(text, text))
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return convert
