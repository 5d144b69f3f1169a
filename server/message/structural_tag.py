"""xgrammar's language of structural tags, which clients of vLLM and SGLang send, translated to one Lark grammar.

A format that can go on for ever (`any_text`, tags amid text) stops at the first place where what follows it begins:
the end of its tag, or the constant after it in a sequence. The rest of the language is plain concatenation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from octavo.runtime.constraint import GrammarError
from octavo.server.message.grammars import (
    JsonStyle,
    checked,
    inner_schema,
    lark_grammar,
    lark_of,
    regex_terminal,
)
from octavo.server.message.lark_rules import either, quoted, without
from octavo.server.message.schema import MAX_BYTES, check_nesting
from octavo.server.message.schema_places import SchemaError
from octavo.server.message.xml_parameters import XML_STYLES, xml_parameters

MAX_DEPTH = 32  # of formats
MAX_LEVELS = 160  # of JSON: formats, and a schema in the innermost of them
MAX_RULES = 5000
UNBOUNDED = {"any_text", "any_tokens", "triggered_tags", "token_triggered_tags", "dispatch", "token_dispatch"}
FIELDS: dict[str, tuple[set[str], set[str]]] = {  # of each type: those that it must have, and those that it may
    "const_string": ({"value"}, set()),
    "json_schema": ({"json_schema"}, {"style", "any_order", "max_whitespace_cnt"}),
    "qwen_xml_parameter": ({"json_schema"}, set()),
    "regex": ({"pattern"}, set()),
    "grammar": ({"grammar"}, set()),
    "any_text": (set(), {"excludes", "max_chars", "max_tokens"}),
    "sequence": ({"elements"}, set()),
    "or": ({"elements"}, set()),
    "optional": ({"content"}, set()),
    "plus": ({"content"}, set()),
    "star": ({"content"}, set()),
    "repeat": ({"min", "max", "content"}, set()),
    "tag": ({"begin", "content", "end"}, set()),
    "triggered_tags": ({"triggers", "tags"}, {"at_least_one", "stop_after_first", "excludes"}),
    "tags_with_separator": ({"tags", "separator"}, {"at_least_one", "stop_after_first"}),
    "dispatch": ({"rules"}, {"loop", "excludes"}),
    "token": ({"token"}, set()),
    "exclude_token": (set(), {"exclude_tokens"}),
    "any_tokens": (set(), {"exclude_tokens", "max_tokens"}),
    "token_triggered_tags": ({"trigger_tokens", "tags"}, {"at_least_one", "stop_after_first", "exclude_tokens"}),
    "token_dispatch": ({"rules"}, {"loop", "exclude_tokens"}),
}
Format = dict[str, Any]
TokenIds = Callable[[int | str], int | None]  # the id of a token, by id or by text; None where there is none


def tag_grammar(tag: Any, style: JsonStyle, token_id: TokenIds) -> str:
    """A grammar of {"type": "structural_tag", ...}, in the old form or the new. Raises GrammarError."""
    if not isinstance(tag, dict):
        raise GrammarError("must be an object")
    unknown = set(tag) - {"type", "format", "structures", "triggers"}
    if unknown or tag.get("type", "structural_tag") != "structural_tag":
        raise GrammarError(f"{sorted(unknown)[0] if unknown else 'type'}: not a part of a structural tag")
    if ("format" in tag) == ("structures" in tag or "triggers" in tag):
        raise GrammarError('needs either "format", or "structures" with "triggers"')
    _check_size(tag)
    writer = _Writer(style, token_id)
    writer.rules.append("start: " + writer.ended(tag["format"] if "format" in tag else _of_old(tag), "format", None))
    text = "\n".join(writer.rules)
    grammars: list[dict[str, Any]] = [{"lark_grammar": text}, *writer.grammars]
    return checked(msgspec.json.encode({"grammars": grammars}).decode(), knows_tokens=True)


def _check_size(tag: Format) -> None:
    try:
        check_nesting(tag, MAX_LEVELS)
    except SchemaError:
        raise GrammarError(f"it is nested more than {MAX_LEVELS} levels deep") from None
    size = len(msgspec.json.encode(tag))
    if size > MAX_BYTES:
        raise GrammarError(f"it has {size} bytes; {MAX_BYTES} is the most")


def _of_old(tag: Format) -> Format:
    """OpenAI-like structures and triggers as the format that they mean."""
    structures = tag.get("structures")
    if not isinstance(structures, list) or not structures:
        raise GrammarError("structures: must be a list of at least one structure")
    tags = []
    for number, structure in enumerate(structures):
        if not isinstance(structure, dict) or set(structure) != {"begin", "schema", "end"}:
            raise GrammarError(f'structures.{number}: must be an object of "begin", "schema" and "end"')
        schema = structure["schema"]
        if isinstance(schema, str):
            schema = _decoded(schema, f"structures.{number}.schema")
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]})
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


def _decoded(text: str, where: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GrammarError(f"{where}: is no JSON: {error}") from None


class _Writer:
    """Writes the rules of one grammar. A method for each type of format returns an expression."""

    def __init__(self, style: JsonStyle, token_id: TokenIds) -> None:
        self.rules: list[str] = []
        self.grammars: list[dict[str, Any]] = []
        self._style = style
        self._token_id = token_id
        self._depth = 0
        self._stops: list[int] = []  # the token that ends the tag around

    def rule(self, body: str, *, terminal: bool = False, lazy: bool = False) -> str:
        """Add a rule; its name."""
        if len(self.rules) > MAX_RULES:
            raise GrammarError(f"it has more than {MAX_RULES} parts")
        name = f"{'T' if terminal else 'r'}{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def ended(self, format_: Any, where: str, ends: list[str] | None) -> str:
        """A format, and one of the texts that end it; None: it ends with the answer."""
        kind = self._check(format_, where)
        if self._depth >= MAX_DEPTH:
            raise GrammarError(f"{where}: nested more than {MAX_DEPTH} deep")
        self._depth += 1
        if kind in UNBOUNDED:
            text: str = getattr(self, "_" + kind)(format_, where, ends)
        elif kind == "sequence":
            text = self._sequence(format_, where, ends)
        elif kind == "or":
            text = either(
                [
                    self.ended(part, at, ends)
                    for at, part in _parts(format_, "elements", where, "format") or [(where, {})]
                ]
            )
        else:
            text = getattr(self, "_" + kind)(format_, where) + self._end(ends)
        self._depth -= 1
        return text

    def bounded(self, format_: Any, where: str) -> str:
        """A format that is repeated, or followed by something else."""
        if _is_unbounded(format_):
            raise GrammarError(f"{where}: can go on for ever; put it in a tag, or last")
        return self.ended(format_, where, None)

    def _check(self, format_: Any, where: str) -> str:
        kind = format_.get("type") if isinstance(format_, dict) else None
        if not isinstance(kind, str) or kind not in FIELDS:
            raise GrammarError(f"{where}.type: must be one of {', '.join(FIELDS)}")
        needed, optional = FIELDS[kind]
        if missing := needed - set(format_):
            raise GrammarError(f"{where}.{sorted(missing)[0]}: missing in {kind}")
        if unknown := set(format_) - needed - optional - {"type"}:
            raise GrammarError(f"{where}.{sorted(unknown)[0]}: no field of {kind}")
        return kind

    def _end(self, ends: list[str] | None) -> str:
        if ends is None or ends == [""]:
            return ""
        return " " + either([quoted(end) for end in ends])

    def _const_string(self, format_: Format, where: str) -> str:
        return quoted(_string(format_, "value", where))

    def _json_schema(self, format_: Format, where: str) -> str:
        style = format_.get("style", "json")
        if format_.get("any_order", False) is not False:
            raise GrammarError(f"{where}.any_order: properties come in the schema's order; only false is supported")
        if format_.get("max_whitespace_cnt") is not None:
            raise GrammarError(f"{where}.max_whitespace_cnt: use whitespace_pattern, such as \\s{{0,2}}")
        schema = format_["json_schema"]
        try:
            inner = inner_schema(schema, self._style)
        except GrammarError as error:
            raise GrammarError(f"{where}.json_schema: {error}") from None
        if style == "json":
            return self.rule(f"%json {msgspec.json.encode(inner).decode()}")
        if not isinstance(style, str) or style not in XML_STYLES:
            raise GrammarError(f"{where}.style: must be one of json, {', '.join(XML_STYLES)}")
        written = xml_parameters(inner, style, self.rule)
        if written is None:
            raise GrammarError(f"{where}.json_schema: {style} needs an object that lists its properties, and no unions")
        return written

    def _qwen_xml_parameter(self, format_: Format, where: str) -> str:
        return self._json_schema({**format_, "type": "json_schema", "style": "qwen_xml"}, where)

    def _regex(self, format_: Format, where: str) -> str:
        return self.rule(regex_terminal(_string(format_, "pattern", where)), terminal=True)

    def _grammar(self, format_: Format, where: str) -> str:
        name = f"g{len(self.grammars)}"
        try:
            text = lark_of(_string(format_, "grammar", where), self._style)
            lark_grammar(text)
        except GrammarError as error:
            raise GrammarError(f"{where}.grammar: {error}") from None
        self.grammars.append({"name": name, "lark_grammar": text})
        return f"@{name}"

    def _any_text(self, format_: Format, where: str, ends: list[str] | None) -> str:
        if format_.get("max_tokens") is not None:
            raise GrammarError(f"{where}.max_tokens: not supported; use max_chars")
        text = without(_strings(format_, "excludes", where))
        if (most := format_.get("max_chars")) is not None:
            text = f"/(?s:.{{0,{_count(most, f'{where}.max_chars')}}})/ & {text}"
        return self._text(text, ends)

    def _text(self, terminal: str, ends: list[str] | None) -> str:
        """Free text, and the first of its ends that comes."""
        name = self.rule(terminal, terminal=True)
        if ends is None or "" in ends:
            return name
        return self.rule(f"{name} {either([quoted(end) for end in ends])}", lazy=True)

    def _sequence(self, format_: Format, where: str, ends: list[str] | None) -> str:
        parts = [(at, part) for at, part in _parts(format_, "elements", where, "format")]
        out = []
        number = 0
        while number < len(parts):
            at, part = parts[number]
            number += 1
            if number == len(parts):
                out.append(self.ended(part, at, ends))
            elif not _is_unbounded(part):
                out.append(self.ended(part, at, None))
            else:
                follower = parts[number][1]
                if self._check(follower, parts[number][0]) != "const_string":
                    raise GrammarError(f"{at}: can go on for ever; a const_string must follow it, or nothing")
                follows = [_string(follower, "value", parts[number][0])]
                number += 1
                out.append(self.ended(part, at, follows) + (self._end(ends) if number == len(parts) else ""))
        return f"({' '.join(out)})" if out else '""' + self._end(ends)

    def _optional(self, format_: Format, where: str) -> str:
        return f"({self.bounded(format_['content'], f'{where}.content')})?"

    def _plus(self, format_: Format, where: str) -> str:
        return f"({self.bounded(format_['content'], f'{where}.content')})+"

    def _star(self, format_: Format, where: str) -> str:
        return f"({self.bounded(format_['content'], f'{where}.content')})*"

    def _repeat(self, format_: Format, where: str) -> str:
        least = _count(format_["min"], f"{where}.min")
        most = "" if format_["max"] == -1 else _count(format_["max"], f"{where}.max")
        if most != "" and least > int(most):
            raise GrammarError(f"{where}.max: is below min")
        return f"({self.bounded(format_['content'], f'{where}.content')}){{{least},{most}}}"

    def _tag(self, format_: Format, where: str) -> str:
        begin = format_["begin"]
        opening = self._one_token(begin, f"{where}.begin") if isinstance(begin, dict) else quoted(begin)
        return f"({opening} {self._rest_of_tag(format_, where)})"

    def _rest_of_tag(self, tag: Format, where: str) -> str:
        """The content of a tag and its end."""
        end = tag["end"]
        if isinstance(end, dict):
            outer = self._stops
            closing = self._one_token(end, f"{where}.end")
            self._stops = [self._id(end["token"], f"{where}.end")]
            content = self.ended(tag["content"], f"{where}.content", None)
            self._stops = outer
            return f"{content} {closing}"
        ends = [end] if isinstance(end, str) else end
        if not isinstance(ends, list) or not ends or not all(isinstance(text, str) for text in ends):
            raise GrammarError(f"{where}.end: must be a string, a list of strings, or a token")
        return self.ended(tag["content"], f"{where}.content", ends)

    def _tags(self, format_: Format, where: str, *, by_token: bool) -> list[tuple[str, Format]]:
        tags = list(_parts(format_, "tags", where, "tag"))
        for at, tag in tags:
            if self._check(tag, at) != "tag" or isinstance(tag["begin"], dict) != by_token:
                raise GrammarError(f"{at}.begin: must be a tag that begins with a {'token' if by_token else 'string'}")
            if not by_token and not isinstance(tag["begin"], str):
                raise GrammarError(f"{at}.begin: must be a string")
        return tags

    def _triggered_tags(self, format_: Format, where: str, ends: list[str] | None) -> str:
        triggers = _strings(format_, "triggers", where)
        tags = self._tags(format_, where, by_token=False)
        groups: dict[str, list[str]] = {}
        for at, tag in tags:
            found = [trigger for trigger in triggers if trigger and tag["begin"].startswith(trigger)]
            if len(found) != 1:
                raise GrammarError(f"{at}.begin: exactly one trigger must be its beginning; {len(found)} are")
            rest = tag["begin"][len(found[0]) :]
            groups.setdefault(found[0], []).append(f"{quoted(rest)} {self._rest_of_tag(tag, at)}")
        first = [self._tag(tag, at) for at, tag in tags] if _flag(format_, "at_least_one", where) else None
        return self._amid_text(
            {trigger: either(rests) for trigger, rests in groups.items()},
            _strings(format_, "excludes", where),
            ends,
            first,
            once=_flag(format_, "stop_after_first", where),
        )

    def _amid_text(
        self,
        groups: dict[str, str],
        excludes: list[str],
        ends: list[str] | None,
        first: list[str] | None,
        *,
        once: bool,
    ) -> str:
        """Free text until a trigger, and what must follow that; again and again, or once."""
        stops = [end for end in ends or [] if end]
        before = self.rule(without(excludes, stops), terminal=True)
        called = [f"{self.rule(f'{before} {quoted(trigger)}', lazy=True)} {rest}" for trigger, rest in groups.items()]
        tail = self._text(without(excludes, list(groups)), ends)
        if once:
            end = self._end(ends)
            return f"{either(first)}{end}" if first else either([f"{either(called)}{end}", tail])
        return f"({either(first) if first else ''} {either(called)}* {tail})"

    def _dispatch(self, format_: Format, where: str, ends: list[str] | None) -> str:
        groups = {}
        for at, (trigger, content) in _rules(format_, where):
            if not isinstance(trigger, str) or not trigger:
                raise GrammarError(f"{at}.0: must be a string that isn't empty")
            groups[trigger] = self.bounded(content, f"{at}.1")
        loop = _flag(format_, "loop", where, default=True)
        return self._amid_text(groups, _strings(format_, "excludes", where), ends, None, once=not loop)

    def _tags_with_separator(self, format_: Format, where: str) -> str:
        tag = either([self._tag(part, at) for at, part in self._tags_of_any_kind(format_, where)])
        more = "" if _flag(format_, "stop_after_first", where) else f" ({self._separator(format_, where)} {tag})*"
        return f"({tag}{more}){'' if _flag(format_, 'at_least_one', where) else '?'}"

    def _separator(self, format_: Format, where: str) -> str:
        return quoted(_string(format_, "separator", where))

    def _tags_of_any_kind(self, format_: Format, where: str) -> list[tuple[str, Format]]:
        tags = list(_parts(format_, "tags", where, "tag"))
        for at, tag in tags:
            if self._check(tag, at) != "tag":
                raise GrammarError(f"{at}.type: must be tag")
        return tags

    def _id(self, token: object, where: str) -> int:
        found = self._token_id(token) if isinstance(token, int | str) and not isinstance(token, bool) else None
        if found is None:
            raise GrammarError(f"{where}: {str(token)[:80]!r} is no token of this model")
        return found

    def _ids(self, format_: Format, name: str, where: str) -> list[int]:
        tokens = format_.get(name) or []
        if not isinstance(tokens, list):
            raise GrammarError(f"{where}.{name}: must be a list of tokens")
        return [self._id(token, f"{where}.{name}.{number}") for number, token in enumerate(tokens)]

    def _any_token_but(self, ids: list[int]) -> str:
        ids = sorted({*ids, *self._stops})
        return f"<[^{','.join(map(str, ids))}]>" if ids else "<[*]>"

    def _one_token(self, format_: Any, where: str) -> str:
        if self._check(format_, where) != "token":
            raise GrammarError(f"{where}.type: must be token")
        return self._token(format_, where)

    def _token(self, format_: Format, where: str) -> str:
        return f"<[{self._id(format_['token'], f'{where}.token')}]>"

    def _exclude_token(self, format_: Format, where: str) -> str:
        return self._any_token_but(self._ids(format_, "exclude_tokens", where))

    def _any_tokens(self, format_: Format, where: str, ends: list[str] | None) -> str:
        if ends is not None:
            raise GrammarError(f"{where}: must be ended by a token, not by a string")
        most = format_.get("max_tokens")
        times = "*" if most is None else f"{{0,{_count(most, f'{where}.max_tokens')}}}"
        return self._any_token_but(self._ids(format_, "exclude_tokens", where)) + times

    def _token_triggered_tags(self, format_: Format, where: str, ends: list[str] | None) -> str:
        triggers = self._ids(format_, "trigger_tokens", where)
        tags = self._tags(format_, where, by_token=True)
        for at, tag in tags:
            if self._id(tag["begin"].get("token"), f"{at}.begin.token") not in triggers:
                raise GrammarError(f"{at}.begin: is none of the trigger tokens")
        called = [self._tag(tag, at) for at, tag in tags]
        excluded = triggers + self._ids(format_, "exclude_tokens", where)
        first = called if _flag(format_, "at_least_one", where) else None
        once = _flag(format_, "stop_after_first", where)
        return self._amid_tokens(called, excluded, first, ends, where, once=once)

    def _amid_tokens(
        self,
        called: list[str],
        excluded: list[int],
        first: list[str] | None,
        ends: list[str] | None,
        where: str,
        *,
        once: bool,
    ) -> str:
        if ends is not None:
            raise GrammarError(f"{where}: must be ended by a token, not by a string")
        free = self._any_token_but(excluded) + "*"
        if once:
            return either(first) if first else f"({free} {either(called)}?)"
        return f"({either(first) if first else ''} ({free} {either(called)})* {free})"

    def _token_dispatch(self, format_: Format, where: str, ends: list[str] | None) -> str:
        called = []
        excluded = self._ids(format_, "exclude_tokens", where)
        for at, (token, content) in _rules(format_, where):
            excluded.append(self._id(token, f"{at}.0"))
            called.append(f"<[{excluded[-1]}]> {self.bounded(content, f'{at}.1')}")
        loop = _flag(format_, "loop", where, default=True)
        return self._amid_tokens(called, excluded, None, ends, where, once=not loop)


def _is_unbounded(format_: Any) -> bool:
    """Whether nothing in a format says where it ends."""
    if not isinstance(format_, dict):
        return False
    kind = format_.get("type")
    elements = format_.get("elements")
    if kind in ("sequence", "or") and isinstance(elements, list) and elements:
        return any(map(_is_unbounded, elements if kind == "or" else elements[-1:]))
    return isinstance(kind, str) and kind in UNBOUNDED


def _parts(format_: Format, name: str, where: str, kind: str) -> list[tuple[str, Any]]:
    parts = format_[name]
    if not isinstance(parts, list) or not parts:
        raise GrammarError(f"{where}.{name}: must be a list of at least one {kind}")
    return [(f"{where}.{name}.{number}", part) for number, part in enumerate(parts)]


def _rules(format_: Format, where: str) -> list[tuple[str, tuple[Any, Any]]]:
    rules = _parts(format_, "rules", where, "rule")
    for at, rule in rules:
        if not isinstance(rule, list) or len(rule) != 2:
            raise GrammarError(f"{at}: must be a list of a pattern and a format")
    return rules


def _string(format_: Format, name: str, where: str) -> str:
    value = format_[name]
    if not isinstance(value, str):
        raise GrammarError(f"{where}.{name}: must be a string")
    return value


def _strings(format_: Format, name: str, where: str) -> list[str]:
    values = format_.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise GrammarError(f"{where}.{name}: must be a list of strings that aren't empty")
    return values


def _flag(format_: Format, name: str, where: str, *, default: bool = False) -> bool:
    value = format_.get(name, default)
    if not isinstance(value, bool):
        raise GrammarError(f"{where}.{name}: must be true or false")
    return value


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**31 - 1:
        raise GrammarError(f"{where}: must be a whole number of at least 0")
    return value
