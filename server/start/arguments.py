"""What stands on a command line of `octavo serve` before it is parsed: as vLLM and SGLang read theirs.

--config FILE is a YAML file of flags, `--name.key value` a part of a flag's JSON, and `--a_b` is `--a-b`. What is left
are octavo's own flags, and those of peer_flags.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.server.start.peer_flags import PeerFlagError, is_known, without_peer_flags

CONFIG = "--config"


class ArgumentsError(ValueError):
    """A command line that says nothing that could be parsed; the message is one line."""


def own_arguments(arguments: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """(the command line in flags that the parser knows, a line for each other that changes nothing).

    Raises ArgumentsError.
    """
    own = {name: action.dest for action in parser._actions for name in action.option_strings}
    words = [_with_dashes(word) for word in arguments]
    try:
        file, words = _config_of(words)
        given, notes = without_peer_flags(_whole_objects(words), own)
        if file is not None:
            added, more = without_peer_flags(_from_file(file, own, _fields_given(given, parser)), own)
            given += added
            notes += more
    except PeerFlagError as error:
        raise ArgumentsError(str(error)) from None
    return given, notes


def _with_dashes(word: str) -> str:
    """`--max_model_len` is `--max-model-len`; keys behind a dot stay as they are."""
    match = re.match(r"--[^.=]*", word)
    return word if match is None else match[0].replace("_", "-") + word[match.end() :]


def _whole_objects(words: Sequence[str]) -> list[str]:
    """`--name.a.b 1 --name.c x` as `--name {"a": {"b": 1}, "c": "x"}`."""
    kept: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    left = iter(words)
    for word in left:
        match = re.match(r"(-{1,2}[A-Za-z][A-Za-z-]*)\.([^=]+)(?:=(.*))?$", word, re.DOTALL)
        if match is None:
            kept.append(word)
            continue
        name, path, value = match.groups()
        if value is None:
            value = next(left, None)
        if value is None:
            raise ArgumentsError(f"{word}: a value is missing")
        *parents, last = path.split(".")
        target = objects.setdefault(name, {})
        for key in parents:
            target = target.setdefault(key, {})
        target[last] = _json_or_text(value)
    return [*kept, *(word for name, value in objects.items() for word in (name, json.dumps(value)))]


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _config_of(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """(the file of --config, the rest of the command line)."""
    kept: list[str] = []
    file: str | None = None
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name != CONFIG:
            kept.append(word)
            continue
        if file is not None:
            raise ArgumentsError(f"{CONFIG} stands there twice; one file holds all options")
        file = value if equals else next(left, "")
        if not file or file.startswith("-"):
            raise ArgumentsError(f"{CONFIG}: the file is missing")
    return (None if file is None else Path(file)), kept


def _fields_given(arguments: Sequence[str], parser: argparse.ArgumentParser) -> frozenset[str]:
    """The fields that the command line itself sets. Ends the program where it is wrong, as argparse does."""
    return frozenset(vars(parser.parse_intermixed_args(arguments)))


def _from_file(file: Path, own: Mapping[str, str], given: frozenset[str]) -> list[str]:
    """The flags of a file, without those that the command line gives: that wins."""
    words: list[str] = []
    for key, value in _entries(file):
        name = f"--{key}" if len(key) > 1 else f"-{key}"
        if name not in own and not is_known(name):
            raise ArgumentsError(f"{file}: {key!r} is no option of octavo serve; {_nearest(key, own)}")
        if name in (CONFIG, "--help"):
            raise ArgumentsError(f"{file}: {key!r} is for the command line")
        field = own.get(name)
        if field in given or (field == "model_flag" and given & {"model", "model_flag"}):
            continue
        words += words_of(name, value, own)
    return words


def _nearest(key: str, own: Iterable[str]) -> str:
    """What may have been meant by a key that is no option."""
    import difflib  # not at each start

    found = difflib.get_close_matches(f"--{key}", [name for name in own if name.startswith("--")], 1, 0.7)
    return f"did you mean {found[0].lstrip('-')!r}?" if found else "octavo serve --help lists them"


def _entries(file: Path) -> list[tuple[str, Any]]:
    """The options of a file, in its order. Raises ArgumentsError, also for an option that stands there twice."""
    import yaml

    try:
        node = yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader)
        loader = yaml.SafeLoader("")
        if not isinstance(node, yaml.MappingNode):
            raise ArgumentsError(f"{CONFIG} {file}: YAML of options is wanted, such as 'port: 8000'")
        entries = [(_option_of(key.value), loader.construct_object(value, deep=True)) for key, value in node.value]
    except OSError as error:
        raise ArgumentsError(f"{CONFIG} {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentsError(f"{CONFIG} {file} is not YAML: {' '.join(str(error).split())}") from None
    names = Counter(name for name, _ in entries)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ArgumentsError(f"{CONFIG} {file}: {twice!r} stands there twice; leave one of them out")
    return entries


def _option_of(key: object) -> str:
    return str(key).replace("_", "-").lstrip("-")


def words_of(name: str, value: Any, own: Container[str]) -> list[str]:
    """A flag with a value that isn't text: true and false are switches, lists several words, objects in them JSON."""
    if value is None:
        return []
    if value is True:
        return [name]
    if value is False:
        off = name.replace("--", "--no-", 1)
        return [off] if off in own or name not in own else []
    if isinstance(value, dict):
        return [name, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [name, *(json.dumps(one) if isinstance(one, dict | list) else str(one) for one in value)]
    return [name, str(value)]
