"""What a schema may cost llguidance: it recurses through references, and a long way down ends the process.

All limits are counts. They were set where compiling takes about a second, or a third of the stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from octavo.server.message.schema_logic import Schema
from octavo.server.message.schema_places import SchemaError

MAX_LEVELS = 300  # of nesting, on the way through references that are met for the first time; 2,000 end a process
MAX_PROPERTIES = 2000  # of one object: their names exclude each other, which costs the square of them
MAX_PATTERNS = 8  # that hold for one string together


def check_limits(schema: Schema, definitions: dict[str, Schema]) -> None:
    """Raise SchemaError for a rewritten schema that would take too long, or too much of the stack."""
    seen: set[str] = set()
    stack = [iter([schema])]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            continue
        if isinstance(node, bool):
            continue
        if (count := len(node.get("properties", ()))) > MAX_PROPERTIES:
            raise SchemaError("properties", "", f"an object lists {count} properties; {MAX_PROPERTIES} is the most")
        if len(stack) >= MAX_LEVELS:
            raise SchemaError(
                "", "", f"it goes {MAX_LEVELS} levels deep through its references; make the chain shorter"
            )
        stack.append(_children(node, definitions, seen))
    counts: dict[str, int] = {}
    for each in (schema, *definitions.values()):
        _check_patterns(each, definitions, counts)


def _children(node: dict[str, Any], definitions: dict[str, Schema], seen: set[str]) -> Iterator[Schema]:
    """The schemas in a node, in its order; what it refers to, where that is new."""
    for keyword, value in node.items():
        if keyword in ("properties", "patternProperties"):
            yield from value.values()
        elif keyword in ("allOf", "anyOf", "prefixItems"):
            yield from value
        elif keyword in ("items", "additionalProperties"):
            yield value
        elif keyword == "$ref" and value not in seen:
            seen.add(value)
            yield definitions[value]


def _check_patterns(schema: Schema, definitions: dict[str, Schema], counts: dict[str, int]) -> None:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, bool):
            if (count := _num_patterns(node, definitions, counts)) > MAX_PATTERNS:
                raise SchemaError(
                    "pattern", "", f"{count} patterns and formats hold for one string; {MAX_PATTERNS} may"
                )
            here = {keyword: value for keyword, value in node.items() if keyword != "$ref"}
            waiting.extend(_children(here, definitions, set()))


def _num_patterns(schema: Schema, definitions: dict[str, Schema], counts: dict[str, int]) -> int:
    """How many regular expressions a string has to match at once, at most."""
    if isinstance(schema, bool):
        return 0
    found = ("pattern" in schema) + ("format" in schema)
    found += sum(_num_patterns(part, definitions, counts) for part in schema.get("allOf", ()))
    found += max((_num_patterns(part, definitions, counts) for part in schema.get("anyOf", ())), default=0)
    if (name := schema.get("$ref")) is not None:
        if name not in counts:
            counts[name] = 0  # while it is counted: what it refers to itself by adds nothing
            counts[name] = _num_patterns(definitions[name], definitions, counts)
        found += counts[name]
    return found
