"""docs/api.md: each route and each field of all dialects, from the server's own OpenAPI document.

`python tests/support/api_reference.py` starts a server of the tiny checkpoint, and writes the page anew.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo_server import serving

Json = dict[str, Any]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
REF = "#/components/schemas/"
HINT = "Taken, and passed over"
_BOUNDS = {
    "&ge;": ("ge", "minimum"),
    "&gt;": ("gt", "exclusiveMinimum"),
    "&le;": ("le", "maximum"),
    "&lt;": ("lt", "exclusiveMaximum"),
}
MOST_NAMED = 24  # values that a cell lists
HEAD = """\
# The HTTP API

Made by `tests/support/api_reference.py` from the server's own OpenAPI document, which `/openapi.json` serves and
`/docs` shows. What the dialects mean is said in [serving](serving.md).

A field that isn't listed is refused with 400 and its name. Every optional field may also be null, which is as if it
were left out, except for `max_new_tokens`: null there is as many tokens as the context leaves.
Fields that change nothing are taken from clients that send them to every server.
"""
ALIKE = ("CompletionRequest", "ChatCompletionRequest", "ResponsesRequest")
SHARED = "Fields of completions, chat and responses"


def page_of(document: Json) -> str:
    """The page of an OpenAPI document."""
    objects = document["components"]["schemas"]
    used: dict[str, None] = {}
    shared = _shared(objects)
    lines = [HEAD, "## Routes\n"]
    for path, method, route in _routes(document):
        lines += _route(path, method, route, objects, used)
    lines += [f"## {SHARED}\n", *_fields(shared, used)]
    sections: dict[str, list[str]] = {}
    while waiting := [name for name in used if name not in sections]:
        name = waiting[0]
        heading = f"### {shown(name)}\n"
        sections[name] = [heading, *_text(objects[name]), *_fields(objects[name], used)]
    lines.append("## Objects\n")
    for name in sorted(sections, key=lambda each: shown(each).lower()):
        lines += sections[name]
    return "\n".join(lines).rstrip() + "\n"


def _shared(objects: Json) -> Json:
    """What the requests of ALIKE have in common, taken out of each of them."""
    own = [objects[name]["properties"] for name in ALIKE]
    shared = {name: field for name, field in own[0].items() if all(each.get(name) == field for each in own)}
    for each in own:
        for name in shared:
            del each[name]
    for name in ALIKE:
        objects[name]["shares"] = True
    return {"properties": shared}


def _routes(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            if method != "head":
                yield path, method.upper(), route


def _route(path: str, method: str, route: Json, objects: Json, used: dict[str, None]) -> list[str]:
    heading = f"{method} {path}"
    lines = [f"### {heading}\n", *_text(route)]
    parameters = [each for each in route.get("parameters", ()) if each["in"] == "query"]
    if parameters:
        fields = {each["name"]: each["schema"] for each in parameters}
        lines += _table(fields, {each["name"] for each in parameters if each["required"]}, used, "query")
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    options = [
        option["$ref"].removeprefix(REF) for option in body.get("oneOf", body.get("anyOf", [body])) if "$ref" in option
    ]
    for name in options:
        schema = objects[name]
        if "at" in schema:
            lines.append(f"Fields are those of [{schema['at']}](#{_slug(schema['at'])}).\n")
            continue
        if len(options) == 1:  # else its fields are one of several choices
            schema["at"] = heading
        lines += [*(_text(schema) if len(options) > 1 else ()), *_fields(schema, used)]
    return lines


def _text(thing: Json) -> list[str]:
    text = " ".join(str(thing.get("description", "")).split())
    return [f"{text}\n"] if text else []


def _fields(schema: Json, used: dict[str, None]) -> list[str]:
    """The table of an object's fields, and what else it takes."""
    fields: Json = schema.get("properties", {})
    hints = [name for name, field in fields.items() if str(field.get("description", "")).startswith(HINT)]
    nulls = [name for name, field in fields.items() if field.get("type") == "null"]
    others = {name: field for name, field in fields.items() if name not in (*hints, *nulls)}
    lines = _table(others, set(schema.get("required", ())), used, "field")
    if schema.get("shares"):
        lines.append(f"And the [{SHARED[0].lower()}{SHARED[1:]}](#{_slug(SHARED)}).\n")
    if hints:
        lines.append(f"Change nothing: {_names(hints)}.\n")
    if nulls:
        lines.append(f"Taken as null alone: {_names(nulls)}.\n")
    if schema.get("additionalProperties") is True:
        lines.append("Other fields are taken too, since clients send them back from other servers.\n")
    return lines


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _table(fields: Json, required: set[str], used: dict[str, None], kind: str) -> list[str]:
    if not fields:
        return []
    lines = [f"| {kind} | type | default |", "|---|---|---|"]
    for name, field in fields.items():
        default = "required" if name in required else _default(field)
        lines.append(f"| `{name}` | {type_of(field, used)} | {default} |")
    return [*lines, ""]


def _default(field: Json) -> str:
    default = field.get("default")
    return "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def type_of(field: Json, used: dict[str, None]) -> str:
    """A JSON schema in words, for a table's cell. Notes the objects that it names."""
    if "$ref" in field:
        name = field["$ref"].removeprefix(REF)
        used[name] = None
        return f"[{shown(name)}](#{_anchor(name)})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in field:
            options = [type_of(option, used) for option in field[key] if option.get("type") != "null"]
            return " or ".join(dict.fromkeys(options))
    if "const" in field:
        return _value(field["const"])
    if "enum" in field:
        values = [_value(each) for each in field["enum"]]
        more = ["..."] if len(values) > MOST_NAMED else []
        return ", ".join([*values[:MOST_NAMED], *more])
    return _plain(field, used)


def _plain(field: Json, used: dict[str, None]) -> str:
    match field.get("type"):
        case "array":
            items = type_of(field.get("items", {}), used)
            return f"list of {items}{_bound(field, 'minItems', 'maxItems')}"
        case "object":
            values = field.get("additionalProperties")
            return f"object of {type_of(values, used)}" if isinstance(values, dict) and values else "object"
        case "string":
            return f"string{_bound(field, 'minLength', 'maxLength')}"
        case "integer" | "number" as kind:
            return f"{kind}{_range(field)}"
        case str() as kind:
            return kind
        case _:
            return "anything"


def _bound(field: Json, least: str, most: str) -> str:
    low = field.get(least)
    high = field.get(most)
    if high is None:
        return f" (at least {low})" if low else ""
    return f" ({low} to {high})" if low else f" (at most {high})"


def _range(field: Json) -> str:
    """The bounds of a number, under pydantic's names for them or JSON Schema's."""
    bounds = [
        f"{sign} {_number(field[name])}"
        for sign, options in _BOUNDS.items()
        for name in options
        if field.get(name) is not None
    ]
    return f" {', '.join(bounds)}" if bounds else ""


def _number(value: float) -> str:
    size = int(abs(value))
    if size > 1 << 16 and not size & (size - 1):
        return f"{'-' if value < 0 else ''}2^{size.bit_length() - 1}"
    return f"{value:g}"


def _value(value: Any) -> str:
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def shown(name: str) -> str:
    """An object's name; where two modules have one of the same name, with its module's."""
    *place, last = name.split("__")
    return f"{last} ({place[-1]})" if place else last


def _anchor(name: str) -> str:
    return _slug(shown(name))


def _slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def main() -> int:
    """Write the page."""
    with serving("--served-model-name", "tiny") as server, server.client() as client:
        PAGE.write_text(page_of(client.get("/openapi.json").json()), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
