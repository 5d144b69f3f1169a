"""From a request's tools to the constraint on the calls that its answer may make.

How much is enforced is the server's --tool-strict-level, raised by a tool that is `strict`. What can't be enforced
exactly is refused where the tool is strict; where it isn't, the rest of its schema is enforced.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from octavo.runtime.constraint import GrammarError
from octavo.runtime.messages import Constraint
from octavo.server.message.call_grammar import Callable, CallGrammar, Thinks, call_grammar
from octavo.server.message.format import ToolFormat
from octavo.server.message.grammars import JsonStyle, NoSchemaError, inner_schema
from octavo.server.message.parse import Formats

StrictLevel = Literal["auto", "function", "parameter"]
ANY_ARGUMENTS = {"type": "object"}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}  # of a function without parameters
CONTENT = "content"  # the name of the grammar of an answer without calls


class WantedTool(msgspec.Struct, frozen=True):
    """A tool as the request has it. place: where it stands there. lark: a grammar of its only argument, `input`."""

    name: str
    parameters: dict[str, Any] | None
    place: str
    is_strict: bool = False
    lark: str = ""


@dataclass(frozen=True)
class WantedCalls:
    """The calls that an answer may make, or must. level: None where calls are read, and nothing is enforced.

    tools: those that may be called. several: more than one call. is_open: the prompt has begun a call's header.
    """

    tools: Sequence[WantedTool]
    mode: Literal["auto", "required"] = "auto"
    several: bool = True
    is_open: bool = False
    level: StrictLevel = "parameter"

    @property
    def are_constrained(self) -> bool:
        """Whether anything is enforced."""
        return self.level != "auto" or self.mode == "required" or any(tool.is_strict for tool in self.tools)


def grammar_of_calls(
    wanted: WantedCalls, formats: Formats, content: Constraint | None = None, thinks: Thinks = "freely"
) -> CallGrammar:
    """The grammar of an answer that makes such calls. Raises GrammarError, which names the tool and the place.

    content: what the answer must look like where it makes none. thinks: how often the messages of an answer with
    channels are reasoning.
    """
    form = formats.tools
    assert form is not None
    content = None if wanted.mode == "required" else content
    marks = tuple((mark, token_id) for token_id, mark in formats.marks.items())
    text = "" if content is None else content.grammar
    tools = msgspec.json.encode(list(wanted.tools))
    return _grammar(form, marks, tools, wanted.mode, wanted.several, wanted.is_open, wanted.level, text, thinks)


@functools.lru_cache(maxsize=64)  # an agent sends the same tools in every turn
def _grammar(
    form: ToolFormat,
    marks: tuple[tuple[str, int], ...],
    tools: bytes,
    mode: Literal["auto", "required"],
    several: bool,
    is_open: bool,
    level: StrictLevel,
    content: str,
    thinks: Thinks,
) -> CallGrammar:
    found = msgspec.json.decode(tools, type=list[WantedTool])
    called = [Callable(tool.name, _schema(tool, level), tool.place, tool.lark) for tool in found]
    content_grammars = _named(msgspec.json.decode(content)["grammars"]) if content else []
    return call_grammar(
        form, dict(marks), called, mode, several=several, is_open=is_open, content=content_grammars, thinks=thinks
    )


def _named(grammars: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """Grammars of which the first is called CONTENT."""
    return [{**grammars[0], "name": CONTENT}, *grammars[1:]]


def _schema(tool: WantedTool, level: StrictLevel) -> dict[str, Any]:
    """The schema of a tool's arguments as it is enforced. Raises GrammarError for what is no schema, at every level."""
    schema = NO_ARGUMENTS if tool.parameters is None else tool.parameters
    try:
        if tool.is_strict:
            return inner_schema(_as_object(schema), JsonStyle())
        loosened = _loosened(schema)
    except GrammarError as error:
        raise GrammarError(f"{tool.place}: {error}") from None
    return loosened if level == "parameter" else inner_schema(ANY_ARGUMENTS, JsonStyle())


def _loosened(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without what can't be enforced. Raises NoSchemaError."""
    for attempt in (schema, _leniently(schema)):
        try:
            return inner_schema(_as_object(attempt), JsonStyle())
        except NoSchemaError:
            raise
        except GrammarError:
            continue
    return inner_schema(ANY_ARGUMENTS, JsonStyle())


def _as_object(schema: dict[str, Any]) -> dict[str, Any]:
    """Arguments are an object, whether the schema says so or not."""
    return schema if "type" in schema or "$ref" in schema else {"type": "object", **schema}


def _leniently(schema: dict[str, Any]) -> dict[str, Any]:
    own = schema.get("x-guidance")
    return {**schema, "x-guidance": {**(own if isinstance(own, dict) else {}), "lenient": True}}
