"""Tools in OpenAI's dialects: what requests bring, how their calls are read, and how they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from octavo.server.dialects.conversation import ChatMessage, bounded_json
from octavo.server.dialects.fields import Flag, Open, Strict, Text
from octavo.server.errors import bad_request, field_error
from octavo.server.generation import Reading
from octavo.server.message.parts import Part, calls_of, reasoning_of, text_of
from octavo.server.served_model import ServedModel

MAX_TOOLS = 512
Json = dict[str, Any]
FunctionName = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class FunctionTool(Open):
    """A function that the model may call; its parameters are a JSON schema."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(Strict):
    """One tool of a request."""

    type: Literal["function"]
    function: FunctionTool


class ToolOptions(Strict):
    """The fields of a request that are about tools. Calls are not constrained yet, so none can be required."""

    tools: (
        Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(bounded_json)]
        | None
    ) = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Flag | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> ToolOptions:
        if self.tool_choice == "auto" and not self.tools:
            raise field_error("tool_choice", "tool_choice: 'auto' needs tools")
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise field_error("tools", f"tools: {twice!r} stands there twice; each function needs a name of its own")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the model is shown and may call: none where tool_choice forbids calls."""
        return [] if self.tool_choice == "none" else list(self.tools or ())


def shown_tools(options: ToolOptions, model: ServedModel) -> list[Json] | None:
    """The tools for the chat template. Raises ApiError where this model has no known way to call them."""
    tools = options.callable_tools
    if not tools:
        return None
    found = model.formats.found
    if found.tools is None:
        raise bad_request(
            f"tools: how this model writes tool calls is not known ({found.tools_from}); --tool-call-parser names it",
            "tools",
        )
    return [tool.model_dump(exclude_none=True) for tool in tools]


def reading_of(
    prompt: str, options: ToolOptions, messages: Sequence[ChatMessage], model: ServedModel
) -> Reading | None:
    """How the answer to this prompt is read; None where all of it is text."""
    tools = options.callable_tools
    formats = model.formats.with_tools if tools else model.formats.without_tools
    if formats.is_empty:
        return None
    found = model.formats.found
    reasoning_is_open = found.reasoning is not None and found.reasoning.opened_by(prompt)
    end = None if found.reasoning is None else model.tokenizer.token_id(found.reasoning.end)
    no_constraint = ""
    if formats.tools is not None:
        no_constraint = "an answer that may call tools can't have a constraint yet: leave out one of both"
    elif reasoning_is_open and end is None:
        no_constraint = (
            "the end of this model's reasoning is no token of its own, so a constraint behind it can't be enforced; "
            "switch the reasoning off"
        )
    return Reading(
        formats,
        reasoning_is_open=reasoning_is_open,
        call_is_open=bool(tools) and found.tools is not None and found.tools.opened_by(prompt),
        tools={tool.function.name: tool.function.parameters or {} for tool in tools},
        num_before=sum(len(message.tool_calls or ()) for message in messages),
        only_one=options.parallel_tool_calls is False,
        content_after=((end,),) if reasoning_is_open and end is not None else (),
        no_constraint=no_constraint,
    )


def message_fields(parts: Sequence[Part], echo: str) -> Json:
    """The fields of a whole message: reasoning under both of its names, calls only where there are some."""
    text = echo + text_of(parts)
    reasoning = reasoning_of(parts)
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls_of(parts)
    ]
    fields: Json = {"content": text if text or not (calls or reasoning) else None, "refusal": None}
    if reasoning:
        fields |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        fields["tool_calls"] = calls
    return fields


def part_fields(part: Part, index: int) -> Json:
    """The delta that says one part; `index` is the number of the call that is open."""
    match part.kind:
        case "text":
            return {"content": part.text}
        case "reasoning":
            return {"reasoning": part.text, "reasoning_content": part.text}
        case "call":
            function = {"name": part.text, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": part.call_id, "type": "function", "function": function}]}
        case _:
            return {"tool_calls": [{"index": index, "function": {"arguments": part.text}}]}
