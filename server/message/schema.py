"""JSON Schemas as llguidance can enforce them: rewritten where that changes nothing, refused by name where it would.

`normalized` writes a schema anew out of the keywords that llguidance enforces exactly. A rewriting is equal by the
standard: what an unknown `format` or keyword says is an annotation; `oneOf` is `anyOf` where its branches exclude each
other, or can be made to; `not`, `if`, dependencies and the like become unions of plain schemas. `date`, `time` and
`date-time` become patterns that know leap years. A keyword that has no such form raises SchemaError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from octavo.server.message import schema_keywords
from octavo.server.message.schema_limits import check_limits
from octavo.server.message.schema_logic import Logic, NoOpposite, Schema
from octavo.server.message.schema_node import Node
from octavo.server.message.schema_places import InvalidSchemaError, Place, Places, SchemaError

MAX_BYTES = 1 << 20
MAX_NESTING = 64
MAX_NODES = 50_000  # what llguidance takes
MAX_CHAIN = 80  # nesting and references together: what the interpreter's stack holds


class Normalizer:
    """Rewrites one schema. closed: objects that list properties take no others, unless they say so. lenient: what can't
    be enforced is left out instead of refused; what is no schema is refused all the same."""

    def __init__(self, root: Any, *, closed: bool = False, lenient: bool = False) -> None:
        self.closed = closed
        self.lenient = lenient
        self.written: list[tuple[Place, Schema]] = []  # every node that was rewritten, and where it stood
        self.definitions: dict[str, Schema] = {}
        self.logic = Logic(self._definition)
        self._root = root
        self._places = Places(root)
        self._names: dict[tuple[int, str], str] = {}
        self._waiting: dict[str, tuple[Any, Place]] = {}
        self._origins: dict[str, Place] = {}
        self._chain = 0

    def whole(self) -> Schema:
        """The schema, with all that it refers to in $defs."""
        schema = self.schema(self._root, Place())
        while self._waiting:
            self._definition(next(iter(self._waiting)))
        self._check_loops()
        check_limits(schema, self.definitions)
        return self.with_definitions(schema)

    def _check_loops(self) -> None:
        """Refuse a schema that only refers to itself: no value is valid for it, nor is any invalid."""
        clear: set[str] = set()
        for first in self.definitions:
            name = first
            seen: set[str] = set()
            while name not in clear and isinstance(part := self.definitions[name], dict) and "$ref" in part:
                if name in seen:
                    raise SchemaError("$ref", self._origins[name].pointer, "it refers to itself, and to nothing else")
                seen.add(name)
                name = part["$ref"]
            clear |= seen

    def with_definitions(self, schema: Schema) -> Schema:
        """A rewritten node as a schema of its own."""
        if isinstance(schema, bool) or not self.definitions:
            return schema
        return {**schema, "$defs": {name.rpartition("/")[2]: part for name, part in self.definitions.items()}}

    def schema(self, source: Any, outer: Place) -> Schema:
        """One node written anew."""
        if isinstance(source, bool):
            return source
        if not isinstance(source, dict):
            raise InvalidSchemaError("", outer.pointer, "a schema must be an object, true or false")
        if len(self.written) >= MAX_NODES:
            raise SchemaError("", "", f"it has more than {MAX_NODES} parts")
        if self._chain >= MAX_CHAIN:
            raise SchemaError("", outer.pointer, f"nesting and references go more than {MAX_CHAIN} deep")
        self._chain += 1
        node = Node(source, outer.inside(source))
        self._rewrite(node)
        schema = node.joined()
        self._chain -= 1
        self.written.append((outer, schema))
        return schema

    def _rewrite(self, node: Node) -> None:
        source = node.source
        if "$ref" in source and node.place.draft < 2019:
            source = {"$ref": source["$ref"]}  # older drafts ignore what stands beside it
        for keyword, value in source.items():
            if keyword == "properties":
                node.before = len(node.parts)
            self._apply(keyword, value, node)
        for keyword, finish in schema_keywords.FINISHERS:
            if keyword in source or keyword == "":
                self._tried(keyword, node, partial(finish, self, node))

    def _apply(self, keyword: str, value: Any, node: Node) -> None:
        handler = schema_keywords.HANDLERS.get(keyword)
        if handler is not None:
            self._tried(keyword, node, partial(handler, self, keyword, value, node))

    def _tried(self, keyword: str, node: Node, work: Callable[[], None]) -> None:
        """Do it; where a keyword can't be enforced, leave it out if that is wanted."""
        chain = self._chain
        try:
            work()
        except NoOpposite as no:
            error = node.refuse(
                keyword, f"what excludes {no.keyword!r} can't be enforced; write the allowed values out"
            )
            if not self.lenient:
                raise error from None
            self._chain = chain
        except SchemaError as error:
            if not self.lenient or isinstance(error, InvalidSchemaError):
                raise
            self._chain = chain

    def reference(self, value: object, node: Node) -> Schema:
        """What a `$ref` becomes."""
        target, place = self._places.find(value, node.place)
        if isinstance(target, bool):
            return target
        key = (id(target), place.base)
        if key not in self._names:
            name = f"#/$defs/{len(self._names)}"
            self._names[key] = name
            self._waiting[name] = (target, place)
            self._origins[name] = place
        return {"$ref": self._names[key]}

    def _definition(self, name: str) -> Schema:
        """What a rewritten reference stands for. Raises NoOpposite where that isn't known yet."""
        if name in self._waiting:
            target, place = self._waiting.pop(name)
            self.definitions[name] = self.schema(target, place)
        if name not in self.definitions:
            raise NoOpposite("$ref")  # it refers to itself
        return self.definitions[name]


def normalized(schema: Any, *, closed: bool = False, lenient: bool = False) -> Schema:
    """The schema as llguidance enforces it exactly. Raises SchemaError."""
    return normalizer_of(schema, closed=closed, lenient=lenient)[1]


def normalizer_of(schema: Any, *, closed: bool = False, lenient: bool = False) -> tuple[Normalizer, Schema]:
    """The same, and who did it: it knows where each part stood."""
    check_nesting(schema)
    try:
        normalizer = Normalizer(schema, closed=closed, lenient=lenient)
        return normalizer, normalizer.whole()
    except RecursionError:
        raise SchemaError("", "", "it is nested too deeply, through its references") from None


def check_nesting(value: Any, most: int = MAX_NESTING) -> None:
    """Refuse a value that is nested too deeply to be walked."""
    level = [value]
    for _ in range(most):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise SchemaError("", "", f"it is nested more than {most} levels deep")
