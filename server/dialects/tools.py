"""Tools in OpenAI's dialects: what requests bring, how their calls are read, and how they are sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from octavo.server.dialects.conversation import ChatMessage, bounded_json, text_of_message
from octavo.server.dialects.custom_input import InputText, input_schema
from octavo.server.dialects.fields import Flag, Open, Strict, Text, named_twice
from octavo.server.dialects.thinking import ThinkingOptions, reasoning_tokens
from octavo.server.errors import bad_request, field_error
from octavo.server.hints import Hint
from octavo.server.message.call_constraint import StrictLevel, WantedCalls, WantedTool
from octavo.server.message.grammars import MAX_TEXT
from octavo.server.message.parts import Call, Part, calls_of, reasoning_of, text_of
from octavo.server.reading import Reading
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


class ToolHints(Strict):
    """Keys of a tool that ask for nothing here: Anthropic's, which gateways leave where they found them."""

    cache_control: Hint = None
    eager_input_streaming: Hint = None
    input_examples: Hint = None


class Tool(ToolHints):
    """One tool of a request."""

    type: Literal["function"]
    function: FunctionTool


class InputGrammar(Strict):
    """What a custom tool's input must look like."""

    syntax: Literal["lark", "regex"]
    definition: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_TEXT)]


class InputFormat(Strict):
    """A custom tool's input: any text, or what a grammar describes."""

    type: Literal["text", "grammar"]
    grammar: InputGrammar | None = None

    @model_validator(mode="after")
    def _check_type(self) -> InputFormat:
        if (self.type == "grammar") != (self.grammar is not None):
            raise ValueError('grammar goes with type "grammar", and must be there')
        return self


class CustomSpec(Open):
    """A tool that is called with text."""

    name: FunctionName
    description: Text | None = None
    format: InputFormat | None = None

    @property
    def lark(self) -> str:
        """The Lark grammar of its input, if it has one."""
        grammar = self.format.grammar if self.format is not None else None
        return grammar.definition if grammar is not None and grammar.syntax == "lark" else ""


class CustomTool(ToolHints):
    """One tool of a request that is called with text."""

    type: Literal["custom"]
    custom: CustomSpec

    def as_function(self) -> FunctionTool:
        """The function of one string that stands for it in the prompt. Its grammar is shown, if it has one."""
        grammar = self.custom.format.grammar if self.custom.format is not None else None
        pattern = grammar.definition if grammar is not None and grammar.syntax == "regex" else None
        told = [self.custom.description or ""]
        if grammar is not None:
            told.append(f"The input must match this {grammar.syntax} grammar:\n{grammar.definition}")
        return FunctionTool(
            name=self.custom.name,
            description="\n\n".join(text for text in told if text) or None,
            parameters=input_schema(pattern),
            strict=True,
        )


class ToolName(Open):
    """A function by its name."""

    name: FunctionName


class NamedChoice(Strict):
    """The tool that must be called."""

    type: Literal["function", "custom"]
    function: ToolName | None = None
    custom: ToolName | None = None

    @model_validator(mode="after")
    def _check_type(self) -> NamedChoice:
        if getattr(self, self.type) is None or None not in (self.function, self.custom):
            raise ValueError(f"needs {self.type}, with the tool's name, and nothing else")
        return self

    @property
    def name(self) -> str:
        """The tool's name."""
        named = self.function or self.custom
        assert named is not None
        return named.name


class AllowedTools(Strict):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedChoice(Strict):
    """Which of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: object) -> str:
    if isinstance(value, dict):
        return "<allowed>" if value.get("type") == "allowed_tools" else "<named>"
    return "<mode>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedChoice, Tag("<named>")]
    | Annotated[AllowedChoice, Tag("<allowed>")],
    Discriminator(_kind_of_choice),
]
AnyTool = Annotated[Tool | CustomTool, Field(discriminator="type")]
Tools = Annotated[
    list[AnyTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(bounded_json)
]
Functions = Annotated[
    list[FunctionTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(bounded_json)
]


class ToolOptions(ThinkingOptions):
    """The fields of a request that are about tools and reasoning; functions and function_call are older names."""

    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Flag | None = None
    functions: Functions | None = None
    function_call: Literal["none", "auto"] | ToolName | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> ToolOptions:
        if self.functions is not None and (self.tools is not None or self.tool_choice is not None):
            raise field_error("functions", "functions: the older name of tools; leave one of both out")
        if self.functions is None and self.function_call not in (None, "none"):
            raise field_error("function_call", "function_call: needs functions")
        if self.tool_choice is not None and self.tool_choice != "none" and not self.tools:
            shown = self.tool_choice if isinstance(self.tool_choice, str) else self.tool_choice.type
            raise field_error("tool_choice", f"tool_choice: {shown!r} needs tools")
        names = [tool.function.name for tool in self.all_tools]
        twice = named_twice(names)
        if twice is not None:
            raise field_error("tools", f"tools: {twice!r} stands there twice; each function needs a name of its own")
        unknown = next((name for name in self._chosen_names or () if name not in names), None)
        if unknown is not None:
            field = "tool_choice" if self.tools else "function_call"
            raise field_error(field, f"{field}: {unknown!r} is none of the tools: {', '.join(names)[:300]}")
        return self

    @property
    def all_tools(self) -> list[Tool]:
        """The tools under either name, as functions."""
        if self.functions is not None:
            return [Tool(type="function", function=function) for function in self.functions]
        return as_functions(self.tools or ())

    @property
    def customs(self) -> dict[str, str]:
        """The names of tools that are called with text, and the Lark grammars of those that have one."""
        return {tool.custom.name: tool.custom.lark for tool in self.tools or () if isinstance(tool, CustomTool)}

    @property
    def _chosen_names(self) -> list[str] | None:
        """The tools that tool_choice restricts calls to."""
        choice = self.tool_choice if self.functions is None else self.function_call
        match choice:
            case NamedChoice():
                return [choice.name]
            case ToolName():
                return [choice.name]
            case AllowedChoice():
                return [tool.name for tool in choice.allowed_tools.tools]
        return None

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        choice = self.tool_choice
        if isinstance(choice, AllowedChoice):
            return choice.allowed_tools.mode == "required"
        return self.is_named or choice == "required"

    @property
    def is_named(self) -> bool:
        """Whether one tool was chosen by its name: then the answer is no decision of the model's to call one."""
        return isinstance(self.tool_choice, NamedChoice) or isinstance(self.function_call, ToolName)

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the model is shown: none where tool_choice forbids calls."""
        forbids = "none" in (self.tool_choice, self.function_call)
        return [] if forbids else self.all_tools

    def wanted_calls(self, level: StrictLevel, *, is_open: bool) -> WantedCalls:
        """The calls that the answer may make, or must."""
        chosen = self._chosen_names
        customs = self.customs
        tools = []
        for number, tool in enumerate(self.callable_tools):
            spec = tool.function
            place = f"tools.{number}.function.parameters"
            if self.functions is not None:
                place = f"functions.{number}.parameters"
            elif spec.name in customs:
                place = f"tools.{number}.custom.format"
            if chosen is None or spec.name in chosen:
                lark = customs.get(spec.name, "")
                tools.append(WantedTool(spec.name, spec.parameters, place, spec.strict or False, lark))
        is_restricted = chosen is not None and len(tools) < len(self.callable_tools)
        several = self.parallel_tool_calls is not False and not self.is_named and self.functions is None
        mode: Literal["auto", "required"] = "required" if self.must_call else "auto"
        return WantedCalls(tools, mode, several, is_open, "function" if is_restricted and level == "auto" else level)


def as_functions(tools: Sequence[AnyTool]) -> list[Tool]:
    """The tools as the chat template knows them."""
    return [
        Tool(type="function", function=tool.as_function()) if isinstance(tool, CustomTool) else tool for tool in tools
    ]


def shown_tools(options: ToolOptions, model: ServedModel) -> list[Json] | None:
    """The tools for the chat template. Raises ApiError where this model has no known way to call them."""
    return templated(options.callable_tools, model)


def templated(tools: Sequence[Tool], model: ServedModel) -> list[Json] | None:
    """These tools for the chat template. Raises ApiError, as shown_tools does."""
    if not tools:
        return None
    found = model.formats.found
    if found.tools is None:
        raise bad_request(
            f"tools: how this model writes tool calls is not known ({found.tools_from}); --tool-call-parser names it",
            "tools",
        )
    return [tool.model_dump(exclude_none=True, exclude=set(ToolHints.model_fields)) for tool in tools]


def reading_of(
    prompt: str, options: ToolOptions, messages: Sequence[ChatMessage], model: ServedModel
) -> Reading | None:
    """How the answer to this prompt is read; None where all of it is text."""
    tools = options.callable_tools
    formats = model.formats.with_tools if tools else model.formats.without_tools
    if formats.is_empty:
        return None
    found = model.formats.found
    begun = begun_turn(prompt, messages)
    reasoning_is_open = found.reasoning is not None and found.reasoning.opened_by(prompt, begun)
    call_is_open = bool(tools) and found.tools is not None and found.tools.opened_by(prompt)
    reasoning_is_closed = found.reasoning is not None and found.reasoning.closed_by(prompt, begun)
    reasoning = reasoning_tokens(model, formats, options.budget, is_open=reasoning_is_open)
    if options.separate_reasoning is False:
        formats = dataclasses.replace(formats, reasoning=None)
    return Reading(
        formats,
        reasoning_is_open=reasoning_is_open,
        reasoning_is_closed=reasoning_is_closed,
        call_is_open=call_is_open,
        goes_on=bool(begun),
        tools={tool.function.name: tool.function.parameters or {} for tool in tools},
        num_before=sum(len(message.tool_calls or ()) for message in messages),
        only_one=options.parallel_tool_calls is False or options.functions is not None,
        calls=options.wanted_calls(model.tool_strict_level, is_open=call_is_open) if tools else None,
        reasoning=reasoning,
        budget=options.budget,
    )


def begun_turn(prompt: str, messages: Sequence[ChatMessage]) -> str:
    """The prompt from the turn on that the client has begun, and that the answer goes on with; "" if it hasn't."""
    said = _text_of(messages[-1])
    if messages[-1].role != "assistant" or not said or not prompt.rstrip().endswith(said):
        return ""
    start = prompt.rindex(said)
    before = _text_of(messages[-2]) if len(messages) > 1 else ""
    found = prompt.rfind(before, 0, start) if before else -1
    return prompt[start if found < 0 else found + len(before) :]  # with what the template has put in front


def _text_of(message: ChatMessage) -> str:
    text = text_of_message(message)
    return (text if isinstance(text, str) else text[-1].get("text", "")).strip()


def message_fields(parts: Sequence[Part], echo: str, options: ToolOptions | None = None) -> Json:
    """The fields of a whole message: reasoning under both of its names, calls only where there are some.

    options: of the request, whose words for calls the answer has.
    """
    text = echo + text_of(parts)
    reasoning = reasoning_of(parts)
    calls = calls_of(parts)
    fields: Json = {"content": text if text or not (calls or reasoning) else None, "refusal": None}
    if reasoning:
        fields |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls and options is not None and options.functions is not None:
        fields["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        customs = {} if options is None else options.customs
        fields["tool_calls"] = [_call_fields(call, is_custom=call.name in customs) for call in calls]
    return fields


def _call_fields(call: Call, *, is_custom: bool) -> Json:
    if is_custom:
        custom = {"name": call.name, "input": InputText().take(call.arguments)}
        return {"id": call.call_id, "type": "custom", "custom": custom}
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def custom_fields(part: Part, index: int, text: InputText) -> Json:
    """The delta that says a part of a call with text, whose input so far is in `text`; empty where there is no more."""
    if part.kind == "call":
        custom = {"name": part.text, "input": ""}
        return {"tool_calls": [{"index": index, "id": part.call_id, "type": "custom", "custom": custom}]}
    said = text.take(part.text)
    return {"tool_calls": [{"index": index, "custom": {"input": said}}]} if said else {}


def part_fields(part: Part, index: int, options: ToolOptions | None = None) -> Json:
    """The delta that says one part; `index` is the number of the call that is open."""
    match part.kind:
        case "text":
            return {"content": part.text}
        case "reasoning":
            return {"reasoning": part.text, "reasoning_content": part.text}
        case _:
            pass
    is_new = part.kind == "call"
    function = {"name": part.text, "arguments": ""} if is_new else {"arguments": part.text}
    if options is not None and options.functions is not None:
        return {"function_call": function}
    about = {"id": part.call_id, "type": "function"} if is_new else {}
    return {"tool_calls": [{"index": index, **about, "function": function}]}


def finish_reason_of(finish_reason: str | None, options: ToolOptions) -> str | None:
    """How an answer with calls that has ended by itself has ended: where the model chose to call, it says so."""
    if finish_reason != "stop" or options.is_named:
        return finish_reason
    return "tool_calls" if options.functions is None else "function_call"
