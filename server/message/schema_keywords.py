"""What becomes of each keyword of JSON Schema: what schema.py's Normalizer calls.

HANDLERS run in the order in which a schema has its keywords. FINISHERS judge several of them together, afterwards. A
keyword that stands in neither table is an annotation by the standard, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import msgspec
import re2

from octavo.server.message.patterns import FORMAT_PATTERNS, FORMATS, PatternError, literal, rust_pattern
from octavo.server.message.schema_logic import COUNTS, TYPES, NoOpposite, Schema, types_of
from octavo.server.message.schema_node import Node, Rewriter

Handler = Callable[[Rewriter, str, Any, Node], None]
EXACT = 2**53  # whole numbers up to here are what llguidance computes with
MAX_ORDERED = 5  # values of a set whose orders are all written out
MAX_POSITIONS = 16  # where an item that must be contained may stand
MAX_COPIED = 1 << 16  # bytes of what must be contained, in all of these places
MAX_COUNT = 10**6


def _type(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(name in (*TYPES, "integer") for name in names):
        raise node.malformed(keyword, f"must be one or several of {', '.join((*TYPES, 'integer'))}")
    node.plain["type"] = value


def _values(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if keyword == "enum" and (not isinstance(value, list) or not value):
        refuse = node.refuse if isinstance(value, list) else node.malformed  # the standard allows []
        raise refuse(keyword, "must be a list of at least one value")
    _check_numbers(keyword, value, node)
    node.plain[keyword] = value


def _check_numbers(keyword: str, value: Any, node: Node) -> None:
    if isinstance(value, list):
        for item in value:
            _check_numbers(keyword, item, node)
    elif isinstance(value, dict):
        for item in value.values():
            _check_numbers(keyword, item, node)
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > EXACT:
        raise node.refuse(keyword, f"{value} is a number beyond 2**53, which can't be told from its neighbors")


def _count(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise node.malformed(keyword, "must be a whole number of at least 0")
    if value <= MAX_COUNT or keyword.startswith("min"):
        node.plain[keyword] = value
    if value > MAX_COUNT and keyword.startswith("min"):
        raise node.refuse(keyword, f"{value} is more than any answer holds")


def _bound(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if isinstance(value, bool) and keyword.startswith("exclusive") and node.place.draft in (4, 2020):
        plain = keyword.removeprefix("exclusive").lower()
        if value and plain in node.source:  # draft 4's meaning
            _bound(_, keyword, node.source[plain], node)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise node.malformed(keyword, "must be a number")
    _check_numbers(keyword, value, node)
    if keyword == "multipleOf" and value <= 0:
        raise node.malformed(keyword, "must be above 0")
    node.plain[keyword] = value


def _pattern(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    _add_pattern(_translated(keyword, value, node), node)


def _add_pattern(pattern: str, node: Node) -> None:
    if "pattern" in node.plain:
        node.parts.append({"pattern": pattern})
    else:
        node.plain["pattern"] = pattern


def _translated(keyword: str, value: Any, node: Node) -> str:
    if not isinstance(value, str):
        raise node.malformed(keyword, "must be a string")
    try:
        return rust_pattern(value)
    except PatternError as error:
        raise node.refuse(keyword, f"in the regular expression {value[:80]!r} {error}") from None


def _format(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if not isinstance(value, str):
        raise node.malformed(keyword, "must be a string")
    if value in FORMAT_PATTERNS:
        _add_pattern(FORMAT_PATTERNS[value], node)
    elif value in FORMATS:
        node.plain["format"] = FORMATS[value]
    elif value == "regex":
        raise node.refuse(keyword, "'regex' can't be enforced; leave it out")


def _properties(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if not isinstance(value, dict):
        raise node.malformed(keyword, "must be an object of schemas")
    found = {name: to.schema(part, node.place.step(keyword, name)) for name, part in value.items()}
    if keyword == "patternProperties":
        found = {_translated(keyword, name, node): part for name, part in found.items()}
    node.plain[keyword] = found


def _required(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    node.plain[keyword] = _names(keyword, value, node)


def _names(keyword: str, value: Any, node: Node) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise node.malformed(keyword, "must be a list of names of properties")
    return list(dict.fromkeys(value))


def _one_schema(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    node.plain[keyword] = to.schema(value, node.place.step(keyword))


def _items(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if not isinstance(value, list):
        _one_schema(to, keyword, value, node)
        return
    _listed(to, "prefixItems", value, node, keyword)  # what it was called before 2020
    if "additionalItems" in node.source:
        node.plain["items"] = to.schema(node.source["additionalItems"], node.place.step("additionalItems"))


def _prefix_items(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if not isinstance(value, list):
        raise node.malformed(keyword, "must be a list of schemas")
    _listed(to, keyword, value, node, keyword)


def _listed(to: Rewriter, keyword: str, value: list[Any], node: Node, named: str) -> None:
    node.plain[keyword] = [to.schema(part, node.place.step(named, number)) for number, part in enumerate(value)]


def _ref(to: Rewriter, _: str, value: Any, node: Node) -> None:
    node.parts.append(to.reference(value, node))


def _branches(to: Rewriter, keyword: str, value: Any, node: Node) -> list[Schema]:
    if not isinstance(value, list) or not value:
        raise node.malformed(keyword, "must be a list of at least one schema")
    return [to.schema(part, node.place.step(keyword, number)) for number, part in enumerate(value)]


def any_of(options: list[Schema]) -> Schema:
    """A union, in its simplest form."""
    left = [option for option in options if option is not False]
    if not left or True in left:
        return bool(left)
    return left[0] if len(left) == 1 else {"anyOf": left}


def all_of(parts: list[Schema]) -> Schema:
    """What all of these allow, in its simplest form."""
    if False in parts:
        return False
    left = [part for part in parts if part is not True]
    if not left:
        return True
    return left[0] if len(left) == 1 else {"allOf": left}


def _all_of(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    parts = _branches(to, keyword, value, node)
    node.parts.append(False if False in parts else {"allOf": [part for part in parts if part is not True]})


def _any_of(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    node.parts.append(any_of(_branches(to, keyword, value, node)))


def _own_types(node: Node) -> Schema:
    """What a node itself says about the type of a value."""
    named = node.source.get("type")
    if not isinstance(named, str | list) or not named:
        return True
    return {"type": named}


def _one_of(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    branches = _branches(to, keyword, value, node)
    kept: list[Schema] = []
    context = _own_types(node)
    for number, branch in enumerate(branches):
        overlapping = [
            other
            for at, other in enumerate(branches)
            if at != number and not to.logic.disjoint(branch, all_of([other, context]))
        ]
        try:
            within = to.logic.types(all_of([branch, context]))
            kept.append(all_of([branch, *(to.logic.opposite(other, within) for other in overlapping)]))
        except NoOpposite as no:
            if to.lenient:
                kept.append(branch)
                continue
            other = branches.index(overlapping[0])
            raise node.refuse(
                keyword,
                f"values may be valid for both branches {min(number, other)} and {max(number, other)}, and "
                f"{no.keyword!r} can't be excluded; use anyOf, or give each branch a required property with a const",
            ) from None
    node.parts.append(any_of(kept))


def _not(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    excluded = to.schema(value, node.place.step(keyword))
    node.parts.append(to.logic.opposite(excluded, to.logic.types(_own_types(node))))


def _if(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if not {"then", "else"} & set(node.source):
        return
    condition = to.schema(value, node.place.step(keyword))
    then = to.schema(node.source.get("then", True), node.place.step("then"))
    otherwise = to.schema(node.source.get("else", True), node.place.step("else"))
    unmet = to.logic.opposite(condition, to.logic.types(all_of([otherwise, _own_types(node)])))
    node.parts.append(any_of([all_of([condition, then]), all_of([unmet, otherwise])]))


def _dependencies(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if not isinstance(value, dict):
        raise node.malformed(keyword, "must be an object")
    for name, needed in value.items():
        if isinstance(needed, list) and keyword != "dependentSchemas":
            with_it: Schema = {"required": [name, *(other for other in _names(keyword, needed, node) if other != name)]}
            if needed in ([], [name]):
                continue
        elif keyword == "dependentRequired":
            raise node.malformed(keyword, "must be an object of lists of names")
        else:
            with_it = all_of([{"required": [name]}, to.schema(needed, node.place.step(keyword, name))])
        node.parts.append(any_of([{"properties": {name: False}}, with_it]))


def _contains(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    least = node.source.get("minContains", 1)
    if least == 0 and "maxContains" not in node.source:
        return
    item = to.schema(value, node.place.step(keyword))
    most = node.source.get("maxItems")
    if item is True and "maxContains" not in node.source and least == 1:
        node.parts.append({"minItems": 1})
    elif least == 1 and "maxContains" not in node.source and isinstance(most, int) and _may_copy(item, most):
        others: list[str] = [name for name in TYPES if name != "array"]
        places = [{"type": "array", "prefixItems": [True] * at + [item], "minItems": at + 1} for at in range(most)]
        node.parts.append(any_of([{"type": others}, *places]))
    else:
        raise node.refuse(
            keyword,
            f"can be enforced only beside a maxItems of at most {MAX_POSITIONS}, without counts, and where it is short",
        )


def _may_copy(item: Schema, times: int) -> bool:
    """Whether a schema may be written out that often; within itself, this multiplies."""
    return times <= MAX_POSITIONS and times * len(msgspec.json.encode(item)) <= MAX_COPIED


def _unevaluated(to: Rewriter, keyword: str, value: Any, node: Node) -> None:
    if value is True:
        return
    plain = {"unevaluatedProperties": "additionalProperties", "unevaluatedItems": "items"}[keyword]
    beside = {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "contains", "$dynamicRef"}
    if beside & set(node.source):
        raise node.refuse(keyword, f"can't be enforced beside {sorted(beside & set(node.source))[0]}; use {plain}")
    if plain not in node.source:
        node.plain[plain] = to.schema(value, node.place.step(keyword))


def _unsupported(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    del value
    raise node.refuse(keyword, "can't be enforced; leave it out, or refer by $ref")


def _old(_: Rewriter, keyword: str, value: Any, node: Node) -> None:
    del value
    if node.place.draft in (3, 2020):
        raise node.refuse(keyword, "is a keyword of draft 3, which isn't supported; write the schema in draft 2020-12")


def _close(to: Rewriter, node: Node) -> None:
    """vLLM's disable_additional_properties."""
    if to.closed and {"properties", "patternProperties"} & set(node.plain):
        node.plain.setdefault("additionalProperties", False)


def _property_names(to: Rewriter, node: Node) -> None:
    """propertyNames: what isn't allowed as a name is false, and the rest is a pattern."""
    names = to.schema(node.source["propertyNames"], node.place.step("propertyNames"))
    if names is True:
        return
    plain = node.plain
    pattern = _pattern_of(names)
    if pattern is None or "patternProperties" in plain:
        raise node.refuse(
            "propertyNames", "can be enforced only where it is one pattern, or an enum, without patternProperties"
        )
    options = re2.Options()
    options.log_errors = False
    try:
        matches = re2.compile(pattern, options)
    except re2.error:
        raise node.refuse("propertyNames", "its regular expression can't be read") from None
    listed = plain.get("properties", {})
    plain["properties"] = {name: part if matches.search(name) else False for name, part in listed.items()}
    plain["patternProperties"] = {pattern: plain.get("additionalProperties", True)}
    plain["additionalProperties"] = False


def _pattern_of(names: Schema) -> str | None:
    """The one regular expression that says what strings a schema allows."""
    if names is False:
        return "[^\\s\\S]"
    if names is True or "string" not in types_of(names):
        return None
    keys = set(names) - {"type"}
    if keys == {"pattern"}:
        found: str = names["pattern"]
        return found
    if keys == {"enum"} or keys == {"const"}:
        values = names.get("enum", [names.get("const")])
        return "^(?:" + "|".join(literal(value) for value in values if isinstance(value, str)) + ")$"
    if keys and keys <= {"minLength", "maxLength"}:
        return rf"^[\s\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    return None


def _unique_items(_: Rewriter, node: Node) -> None:
    """uniqueItems: no matter for up to one item; for a few values all their orders are written out."""
    if node.source["uniqueItems"] is False or node.plain.get("maxItems", 2) < 2:
        return
    items = node.plain.get("items", True)
    values = None if items is True or items is False else items.get("enum", [None][: items.get("type") == "null"])
    if isinstance(items, dict) and items.get("type") == "boolean":
        values = [False, True]
    if not values or len(values) > MAX_ORDERED or "prefixItems" in node.plain or node.plain.get("type") != "array":
        raise node.refuse(
            "uniqueItems", f"can be enforced only for arrays of an enum of at most {MAX_ORDERED} values; leave it out"
        )
    least = node.plain.get("minItems", 0)
    most = min(len(values), node.plain.get("maxItems", len(values)))
    lists = [list(order) for count in range(least, most + 1) for order in permutations(values, count)]
    node.parts.append({"enum": lists} if lists else False)


def _property_counts(_: Rewriter, node: Node) -> None:
    """minProperties and maxProperties, which llguidance takes only where all listed properties are required."""
    plain = node.plain
    listed = [name for name, part in plain.get("properties", {}).items() if part is not False]
    required = plain.get("required", [])
    closed = plain.get("additionalProperties") is False and not plain.get("patternProperties")
    if plain.get("minProperties", 0) <= len(required):
        plain.pop("minProperties", None)
    if closed and plain.get("maxProperties", 0) >= len({*listed, *required}):
        plain.pop("maxProperties", None)
    optional = [name for name in listed if name not in required]
    least = plain.get("minProperties")
    if least == len(required) + 1 and optional and not closed and "maxProperties" not in plain:
        del plain["minProperties"]
        others: Schema = {"properties": dict.fromkeys(optional, False), "minProperties": least}
        node.parts.append(any_of([*({"required": [name]} for name in optional), others]))


HANDLERS: dict[str, Handler] = {
    "type": _type,
    "enum": _values, "const": _values,
    **dict.fromkeys(COUNTS, _count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _bound),
    "pattern": _pattern, "format": _format,
    "properties": _properties, "patternProperties": _properties, "required": _required,
    "additionalProperties": _one_schema, "items": _items, "prefixItems": _prefix_items,
    "$ref": _ref, "allOf": _all_of, "anyOf": _any_of, "oneOf": _one_of, "not": _not, "if": _if,
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), _dependencies),
    "contains": _contains, "unevaluatedProperties": _unevaluated, "unevaluatedItems": _unevaluated,
    "$dynamicRef": _unsupported, "$recursiveRef": _unsupported,
    "divisibleBy": _old, "disallow": _old, "extends": _old,
}  # fmt: skip

FINISHERS: tuple[tuple[str, Callable[[Rewriter, Node], None]], ...] = (
    ("", _close),
    ("propertyNames", _property_names),
    ("uniqueItems", _unique_items),
    ("", _property_counts),
)  # fmt: skip
