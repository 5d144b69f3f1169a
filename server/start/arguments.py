"""What stands on a command line of `octavo serve` before it is parsed: as vLLM and SGLang read theirs.

--config FILE is a YAML file of flags, `--name.key value` a part of a flag's JSON, and `--a_b` is `--a-b`. What is left
are octavo's own flags, and those of peer_flags.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.server.options import ListenOptions, ServerOptions
from octavo.server.several_options import SeveralOptions
from octavo.server.start.peer_flags import PeerFlagError, is_known, without_peer_flags
from octavo.server.upkeep_options import UpkeepOptions

CONFIG = "--config"
MODELS = "models"
OF_THE_SERVER = frozenset(
    field
    for struct in (ListenOptions, ServerOptions, UpkeepOptions, SeveralOptions)
    for field in struct.__struct_fields__
)


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
            entries = [entry for entry in _entries(file) if entry[0] != MODELS]  # see of_models
            fields = _fields_given(given, parser)
            added, more = without_peer_flags(_words_of_entries(file, entries, own, fields), own)
            given += added
            notes += more
    except PeerFlagError as error:
        raise ArgumentsError(str(error)) from None
    return given, notes


def of_models(
    arguments: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[dict[str, list[str]] | None, list[str]]:
    """Where the file of --config names several models, the command line of each, by its name; None where it doesn't.

    What stands beside `models` in the file is said to all of them, and the command line wins. Also a line for each of a
    model's own flags that changes nothing. Raises ArgumentsError.
    """
    own = {name: action.dest for action in parser._actions for name in action.option_strings}
    file, words = _config_of([_with_dashes(word) for word in arguments])
    entries = dict(_entries(file)) if file is not None else {}
    if file is None or MODELS not in entries:
        return None, []
    listed = entries.pop(MODELS)
    if not isinstance(listed, dict) or not listed:
        raise ArgumentsError(f"{file}: models: names with their options are wanted, such as 'small: {{model: DIR}}'")
    try:
        given, _ = without_peer_flags(_whole_objects(words), own)
        fields = _fields_given(given, parser)
        if {"model", "model-path"} & entries.keys():
            raise ArgumentsError(f"{file}: model stands beside models: leave one of them out")
        if {"model", "model_flag"} & fields:
            raise ArgumentsError(f"{file} names the models that are served: leave the one on the command line out")
        found = {}
        notes: list[str] = []
        for name, content in listed.items():
            options = _options_of_model(content, f"{file}: models: {name}", own)
            alone, of_alone = without_peer_flags(_words_of_entries(file, options.items(), own, fields), own)
            notes += [f"models: {name}: {note}" for note in of_alone]
            common = _words_of_entries(file, entries.items(), own, fields | _fields_given(alone, parser))
            found[str(name)] = [*given, *alone, *without_peer_flags(common, own)[0], "--served-model-name", str(name)]
    except PeerFlagError as error:
        raise ArgumentsError(str(error)) from None
    return found, notes


def _options_of_model(content: Any, place: str, own: Mapping[str, str]) -> dict[str, Any]:
    """What stands in the file of one of several models: its directory, or options, of which --model is one."""
    options = {"model": content} if isinstance(content, str) else content
    if not isinstance(options, dict):
        raise ArgumentsError(f"{place}: a directory is wanted, or options with model: DIR")
    options = {_option_of(key): value for key, value in options.items()}
    if not {"model", "model-path"} & options.keys():
        raise ArgumentsError(f"{place}: its model is missing, such as model: DIR")
    if "served-model-name" in options:
        raise ArgumentsError(f"{place}: it is served under the name it has here; model-aliases gives it more names")
    for key in options:
        if own.get(f"--{key}") in OF_THE_SERVER:
            raise ArgumentsError(f"{place}: {key!r} is of the whole server: put it beside models")
    return options


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


def _words_of_entries(
    file: Path, entries: Iterable[tuple[str, Any]], own: Mapping[str, str], given: frozenset[str]
) -> list[str]:
    """The flags of a file, without those that the command line gives: that wins."""
    words: list[str] = []
    for key, value in entries:
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
        if twice := next(_twice(node, _option_of), None):
            raise ArgumentsError(f"{CONFIG} {file}: {twice!r} stands there twice; leave one of them out")
        return [(_option_of(key.value), loader.construct_object(value, deep=True)) for key, value in node.value]
    except OSError as error:
        raise ArgumentsError(f"{CONFIG} {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentsError(f"{CONFIG} {file} is not YAML: {' '.join(str(error).split())}") from None


def _twice(node: Any, named: Callable[[Any], str]) -> Iterator[str]:
    """The keys that stand twice in a mapping of a YAML file, of which its loader would take the last one."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        names = Counter(named(key.value) for key, _ in node.value)
        yield from (name for name, count in names.items() if count > 1)
        for _, value in node.value:
            yield from _twice(value, str)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _twice(value, str)


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
