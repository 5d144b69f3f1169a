"""Two questions about normalized schemas: do two exclude each other, and what is the opposite of one?

Both know only the keywords that the normalizer (schema.py) writes. Where the answer isn't certain they say so: two
schemas are "not provably disjoint", and an opposite raises NoOpposite.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from octavo.server.message.patterns import other_than

Schema = bool | dict[str, Any]
Lookup = Callable[[str], Schema]  # what a "#/$defs/..." stands for

TYPES = ("null", "boolean", "number", "string", "array", "object")
MAX_STEPS = 200_000  # some 0.3 s
MAX_DEPTH = 24
MAX_TEXT = 2000  # characters of all texts that are excluded together
COUNTS = {
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}
BOUNDS = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}
OF_TYPE = {
    "required": "object", "properties": "object", "patternProperties": "object", "additionalProperties": "object",
    "items": "array", "prefixItems": "array", "pattern": "string", "format": "string", "multipleOf": "number",
    **{keyword: kind for keyword, (kind, _, _) in COUNTS.items()},
    **dict.fromkeys(BOUNDS, "number"),
}  # fmt: skip


class NoOpposite(Exception):  # noqa: N818 (an answer, no failure)
    """The opposite of this keyword can't be written as a schema."""

    def __init__(self, keyword: str) -> None:
        super().__init__(keyword)
        self.keyword = keyword


def type_of(value: object) -> str:
    """The JSON type of a value; integers are numbers."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = ((int | float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next(name for kinds, name in names if isinstance(value, kinds))


def types_of(schema: dict[str, Any]) -> list[str]:
    """The types that a node's own `type` allows, "integer" among them; all where it has none."""
    named = schema.get("type", list(TYPES))
    return [named] if isinstance(named, str) else list(named)


def _kinds(schema: dict[str, Any]) -> set[str]:
    kinds = {"number" if name == "integer" else name for name in types_of(schema)}
    if (values := _values(schema)) is not None:
        kinds &= {type_of(value) for value in values}
    return kinds


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """The values that a node lists, if it does."""
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _same(value: object) -> str:
    """A text that is the same for equal values: 1 is 1.0, but not true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{json.dumps(key)}:{_same(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_same, value)) + "]"
    return json.dumps(value)


class Logic:
    """The two questions, within one schema; it counts its steps, so that no schema makes it take long."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._num_steps = 0

    def _step(self, depth: int) -> bool:
        self._num_steps += 1
        return depth < MAX_DEPTH and self._num_steps < MAX_STEPS

    def disjoint(self, one: Schema, other: Schema, depth: int = 0) -> bool:
        """Whether surely no value is valid for both."""
        if one is False or other is False:
            return True
        if one is True or other is True or not self._step(depth):
            return False
        for schema, against in ((one, other), (other, one)):
            if "$ref" in schema and self.disjoint(self._lookup(schema["$ref"]), against, depth + 1):
                return True
            if any(self.disjoint(part, against, depth + 1) for part in schema.get("allOf", ())):
                return True
            if "anyOf" in schema and all(self.disjoint(part, against, depth + 1) for part in schema["anyOf"]):
                return True
            values = _values(schema)
            if values is not None and all(self._fails(value, against) for value in values):
                return True
        return all(self._disjoint_in(kind, one, other, depth) for kind in _kinds(one) & _kinds(other))

    def _disjoint_in(self, kind: str, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        """Whether no value of this type is valid for both."""
        if kind == "object":
            names = {*one.get("required", ()), *other.get("required", ())}
            return any(self.disjoint(_property(one, name), _property(other, name), depth + 1) for name in names)
        for lower, (of_type, upper, _) in COUNTS.items():
            if of_type == kind and lower.startswith("min"):
                least = max(one.get(lower, 0), other.get(lower, 0))
                most = [schema[upper] for schema in (one, other) if upper in schema]
                if most and least > min(most):
                    return True
        return kind == "number" and _ranges_apart(one, other)

    def _fails(self, value: object, schema: dict[str, Any]) -> bool:
        """Whether a value is surely not valid."""
        kind = type_of(value)
        if kind not in _kinds(schema):
            return True
        values = _values(schema)
        if values is not None and _same(value) not in {_same(listed) for listed in values}:
            return True
        if isinstance(value, dict):
            if any(name not in value for name in schema.get("required", ())):
                return True
            return any(self._fails_sub(item, _property(schema, name)) for name, item in value.items())
        return False

    def _fails_sub(self, value: object, schema: Schema) -> bool:
        return schema is False or (schema is not True and self._fails(value, schema))

    def types(self, schema: Schema, depth: int = 0) -> set[str]:
        """The types that a value may have to be valid, "integer" among them; some of them may not be."""
        if schema is False:
            return set()
        if schema is True or not self._step(depth):
            return set(TYPES)
        found = set(types_of(schema))
        if "$ref" in schema:
            found = _common(found, self.types(self._lookup(schema["$ref"]), depth + 1))
        for part in schema.get("allOf", ()):
            found = _common(found, self.types(part, depth + 1))
        if "anyOf" in schema:
            found = _common(found, {name for part in schema["anyOf"] for name in self.types(part, depth + 1)})
        return found

    def opposite(self, schema: Schema, within: set[str] | None = None, depth: int = 0) -> Schema:
        """A schema that is valid for exactly the values that `schema` isn't valid for. Raises NoOpposite.

        within: only values of these types matter.
        """
        within = set(TYPES) if within is None else within
        if isinstance(schema, bool):
            return not schema
        if not self._step(depth):
            raise NoOpposite("a schema of this size")
        options: list[Schema] = []
        own = types_of(schema)
        if "type" in schema:
            options.append(_other_types(own, within))
        for keyword, value in schema.items():
            kind = OF_TYPE.get(keyword)
            if keyword != "type" and (kind is None or kind in own or (kind == "number" and "integer" in own)):
                options.extend(self._opposites(keyword, value, schema, within, depth))
        options = [option for option in options if option is not False]
        if True in options:
            return True
        if len(options) < 2:
            return options[0] if options else False
        return {"anyOf": options}

    def _opposites(
        self, keyword: str, value: Any, schema: dict[str, Any], within: set[str], depth: int
    ) -> list[Schema]:
        """Schemas one of which is valid where this keyword alone is not."""
        if keyword == "$ref":
            return [self.opposite(self._lookup(value), within, depth + 1)]
        if keyword == "allOf":
            return [self.opposite(part, within, depth + 1) for part in value]
        if keyword == "anyOf":
            return [{"allOf": [self.opposite(part, within, depth + 1) for part in value]}]
        if keyword in ("const", "enum"):
            return _other_values([value] if keyword == "const" else value)
        if keyword in COUNTS:
            kind, opposite, step = COUNTS[keyword]
            return [{"type": kind, opposite: value + step}] if value + step >= 0 else []
        if keyword in BOUNDS:
            return [{"type": "number", BOUNDS[keyword]: value}]
        if keyword == "required":
            return [{"type": "object", "properties": {name: False}} for name in value]
        if keyword == "properties":
            opposites = {name: self.opposite(part, None, depth + 1) for name, part in value.items()}
            return [
                {"type": "object", "properties": {name: part}, "required": [name]}
                for name, part in opposites.items()
                if part is not False
            ]
        if value is True or (keyword == "items" and schema.get("maxItems") == 0):
            return []
        raise NoOpposite(keyword)


def _property(schema: dict[str, Any], name: str) -> Schema:
    """What a node itself says about a property."""
    if name in schema.get("properties", {}):
        found: Schema = schema["properties"][name]
        return found
    return True if "patternProperties" in schema else schema.get("additionalProperties", True)


def _ranges_apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    for low, high in ((one, other), (other, one)):
        for upper in ("maximum", "exclusiveMaximum"):
            for lower in ("minimum", "exclusiveMinimum"):
                if upper in low and lower in high:
                    most = low[upper]
                    least = high[lower]
                    if most < least or (most == least and (upper, lower) != ("maximum", "minimum")):
                        return True
    return False


def _common(one: set[str], other: set[str]) -> set[str]:
    """The types in both, where "number" has "integer" in it."""
    both = one & other
    if (
        "integer" in one | other
        and {"integer", "number"} & one
        and {"integer", "number"} & other
        and "number" not in both
    ):
        both.add("integer")
    return both


def _other_types(named: list[str], within: set[str]) -> Schema:
    if "integer" in named and "number" not in named and "number" in within:
        raise NoOpposite("type")  # numbers that aren't whole
    left = [name for name in TYPES if name not in named and name in within]
    return {"type": left} if left else False


def _other_values(values: list[Any]) -> list[Schema]:
    """Schemas one of which is valid for each value that isn't listed."""
    kinds = {type_of(value) for value in values}
    if kinds & {"array", "object"}:
        raise NoOpposite("enum")
    options: list[Schema] = []
    if left := [kind for kind in TYPES if kind not in kinds]:
        options.append({"type": left})
    if "boolean" in kinds:
        options.extend({"const": flag} for flag in (False, True) if not any(flag is value for value in values))
    if "string" in kinds:
        texts = sorted({value for value in values if isinstance(value, str)})
        if sum(map(len, texts)) > MAX_TEXT or max(map(len, texts)) > 200:
            raise NoOpposite("enum")
        options.append({"type": "string", "pattern": f"^{other_than(texts)}$"})
    if "number" in kinds:
        numbers = sorted({value for value in values if type_of(value) == "number"})
        ends: list[Any] = [None, *numbers, None]
        for low, high in pairwise(ends):
            bounds = {"exclusiveMinimum": low, "exclusiveMaximum": high}
            options.append({"type": "number", **{key: value for key, value in bounds.items() if value is not None}})
    return options
