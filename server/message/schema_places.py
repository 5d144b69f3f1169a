"""Where a schema's parts stand: resources ($id), anchors, and what a `$ref` points to. Nothing is ever fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

ROOT = "https://schema.invalid/"
NEWEST = 2020
DRAFTS = {
    "http://json-schema.org/draft-03/schema": 3,
    "http://json-schema.org/draft-04/schema": 4,
    "http://json-schema.org/draft-06/schema": 6,
    "http://json-schema.org/draft-07/schema": 7,
    "https://json-schema.org/draft/2019-09/schema": 2019,
}
IN_ONE = {
    *("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
}
IN_LIST = {"allOf", "anyOf", "items", "oneOf", "prefixItems"}
IN_MAP = {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}


class SchemaError(ValueError):
    """A schema that can't be enforced: which keyword, where, and what would work."""

    def __init__(self, keyword: str, pointer: str, why: str) -> None:
        where = f"{pointer}/{escaped(keyword)}" if keyword else pointer
        super().__init__(f"{where or 'the schema'}: {why}")
        self.keyword = keyword
        self.pointer = pointer


class InvalidSchemaError(SchemaError):
    """A schema that is none by the standard's own meta-schema, such as one with the type "foo"."""


def escaped(name: str) -> str:
    """A name as a step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a schema: the JSON pointer from the root, the URI that references start from, and its draft."""

    pointer: str = ""
    base: str = ROOT
    draft: int = NEWEST

    def step(self, *names: str | int) -> Place:
        """A part of this part."""
        return Place(self.pointer + "".join(f"/{escaped(str(name))}" for name in names), self.base, self.draft)

    def inside(self, node: dict[str, Any]) -> Place:
        """The same place, with what the node itself says about its draft and its URI."""
        draft = self.draft
        if isinstance(node.get("$schema"), str):
            draft = DRAFTS.get(node["$schema"].rstrip("#"), NEWEST)
        name = node.get("id" if draft <= 4 else "$id")
        if not isinstance(name, str) or name.startswith("#") or ("$ref" in node and draft < 2019):
            return Place(self.pointer, self.base, draft)
        return Place(self.pointer, urldefrag(_joined(self.base, name))[0], draft)


def subschemas(node: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The schemas directly in a node, each with the steps to it."""
    for keyword, value in node.items():
        if keyword in IN_ONE and isinstance(value, (dict, bool)):
            yield (keyword,), value
        if keyword in IN_LIST and isinstance(value, list):
            yield from (((keyword, number), item) for number, item in enumerate(value))
        if keyword in IN_MAP and isinstance(value, dict):
            yield from (((keyword, name), item) for name, item in value.items() if isinstance(item, (dict, bool)))


class Places:
    """An index of one schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._resources: dict[str, tuple[Any, Place]] = {ROOT: (root, Place())}
        self._anchors: dict[tuple[str, str], tuple[Any, Place]] = {}
        waiting = [(root, Place())]
        while waiting:
            node, place = waiting.pop()
            if isinstance(node, dict):
                inner = place.inside(node)
                self._note(node, place, inner)
                waiting.extend((child, inner.step(*steps)) for steps, child in subschemas(node))

    def _note(self, node: dict[str, Any], outer: Place, inner: Place) -> None:
        if inner.base != outer.base:
            self._resources.setdefault(inner.base, (node, outer))
        names = [node.get("$anchor"), node.get("$dynamicAnchor")]
        names += [name[1:] for key in ("id", "$id") if isinstance(name := node.get(key), str) and name[:1] == "#"]
        for name in names:
            if isinstance(name, str):
                self._anchors.setdefault((inner.base, name), (node, outer))

    def find(self, reference: object, place: Place) -> tuple[Any, Place]:
        """The node that a `$ref` at `place` points to, and where that stands. Raises SchemaError."""
        if not isinstance(reference, str):
            raise SchemaError("$ref", place.pointer, "must be a string")
        uri, fragment = urldefrag(_joined(place.base, reference))
        fragment = unquote(fragment)
        if uri not in self._resources:
            raise SchemaError(
                "$ref",
                place.pointer,
                f"{reference[:80]!r} is not in this schema, and nothing is fetched: put it in $defs",
            )
        node, found = self._resources[uri]
        if fragment and not fragment.startswith("/"):
            if (uri, fragment) not in self._anchors:
                raise SchemaError("$ref", place.pointer, f"there is no anchor {fragment[:80]!r}")
            return self._anchors[uri, fragment]
        for step in fragment.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                found = found.inside(node).step(name)
                node = node[name]
            elif isinstance(node, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(node):
                found = found.step(name)
                node = node[int(name[:9])]
            elif name or step is not fragment.split("/")[-1]:
                raise SchemaError("$ref", place.pointer, f"nothing stands at {reference[:80]!r}")
        return node, found


def _joined(base: str, reference: str) -> str:
    if not reference or reference.startswith("#"):
        return base.partition("#")[0] + reference  # urljoin would drop the base of a urn
    try:
        return urljoin(base, reference)
    except ValueError:  # such as a bracket that isn't closed
        return reference
