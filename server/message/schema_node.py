"""One node of a schema while it is rewritten, and what its rewriting may ask for (schema.py does it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from octavo.server.message.schema_logic import Logic, Schema
from octavo.server.message.schema_places import InvalidSchemaError, Place, SchemaError

APPLICATORS = ("$ref", "allOf", "anyOf")


@dataclass(slots=True)
class Node:
    """One schema object while it is written anew.

    plain: keywords about the value itself. parts: what else must hold; `before` of them come first, since their
    properties stand before this node's own in an answer.
    """

    source: dict[str, Any]
    place: Place
    plain: dict[str, Any] = field(default_factory=dict)
    parts: list[Schema] = field(default_factory=list)
    before: int = 0

    def refuse(self, keyword: str, why: str) -> SchemaError:
        """An error that names a keyword of this node."""
        return SchemaError(keyword, self.place.pointer, why)

    def malformed(self, keyword: str, why: str) -> SchemaError:
        """The same for a value that the keyword can't have; draft 3 had other ones."""
        return (SchemaError if self.place.draft == 3 else InvalidSchemaError)(keyword, self.place.pointer, why)

    def joined(self) -> Schema:
        """The node and its parts as one schema."""
        if False in self.parts:
            return False
        parts = [(number, part) for number, part in enumerate(self.parts) if part is not True]
        used: set[str] = set()
        first: dict[str, Any] = {}
        last: dict[str, Any] = {}
        rest: list[Schema] = []
        for number, part in parts:
            assert isinstance(part, dict)
            keyword = next(iter(part), "")
            if len(part) == 1 and keyword in APPLICATORS and keyword not in used:
                used.add(keyword)
                (first if number < self.before else last).update(part)
            else:
                rest.append(part)
        if rest and "allOf" in used:
            (first if "allOf" in first else last)["allOf"] = [*(first | last)["allOf"], *rest]
        elif rest:
            last["allOf"] = rest
        return {**first, **self.plain, **last} or True


class Rewriter(Protocol):
    """What rewrites the whole schema. closed, lenient: see schema.py."""

    closed: bool
    lenient: bool
    logic: Logic

    def schema(self, source: Any, outer: Place) -> Schema:
        """A part of the schema, rewritten."""
        ...

    def reference(self, value: object, node: Node) -> Schema:
        """What a `$ref` becomes."""
        ...
