"""POST /v1/responses: its fields, and the chat request that they come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from octavo.server.dialects.chat_request import ChatCompletionRequest, chat_request_of
from octavo.server.dialects.constraint_fields import Grammar, Schema
from octavo.server.dialects.conversation import bounded_json
from octavo.server.dialects.custom_input import input_schema
from octavo.server.dialects.fields import Count, Flag, GenerationRequest, Open, Strict, Text, TextOption, text_or_list
from octavo.server.dialects.responses_items import InputItems, Name, flat_name
from octavo.server.dialects.thinking import NoReasoning
from octavo.server.dialects.tools import MAX_TOOLS, FunctionName
from octavo.server.errors import field_error
from octavo.server.hints import ResponsesHints

Json = dict[str, Any]

HOSTED = (
    "web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "file_search",
    "code_interpreter", "image_generation", "mcp", "computer", "computer_use", "computer_use_preview", "local_shell",
    "shell", "apply_patch", "tool_search", "programmatic_tool_calling",
)  # fmt: skip
"""Tools that OpenAI runs itself. Here nobody does, so the model isn't told of them."""

INCLUDABLE = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]

NAMES_IN_CHAT = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
    "function.parameters": "parameters",
}
"""Fields that have another name in the chat request that does the work."""


class FunctionParam(Open):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class TextInput(Open):
    """Any text."""

    type: Literal["text"]


class GrammarInput(Open):
    """A text of this grammar."""

    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: Grammar


class CustomParam(Open):
    """A tool that is called with free text, which a grammar may describe."""

    type: Literal["custom"]
    name: FunctionName
    description: Text | None = None
    format: TextInput | GrammarInput | None = Field(default=None, discriminator="type")


class NamespaceParam(Open):
    """Tools that have a name in common."""

    type: Literal["namespace"]
    name: FunctionName
    description: Text | None = None
    tools: Annotated[
        list[Annotated[FunctionParam | CustomParam, Field(discriminator="type")]],
        Field(max_length=MAX_TOOLS, fail_fast=True),
    ]


class HostedParam(Open):
    """A tool that OpenAI runs itself: a hint here, where the model may do without."""

    type: Literal[HOSTED]  # type: ignore[valid-type]


def _kind_of_tool(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    if kind in HOSTED:
        return "<hosted>"
    return kind if isinstance(kind, str) else "<tool>"


ToolParam = Annotated[
    Annotated[FunctionParam, Tag("function")]
    | Annotated[CustomParam, Tag("custom")]
    | Annotated[NamespaceParam, Tag("namespace")]
    | Annotated[HostedParam, Tag("<hosted>")],
    Discriminator(_kind_of_tool),
]


class TextFormat(Strict):
    """What the answer's text must look like. A schema is always enforced exactly, whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: Schema = Field(default=None, alias="schema")
    strict: Flag | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError('schema goes with type "json_schema", and must be there')
        return self


class TextConfig(Strict):
    """verbosity is a hint: OpenAI's own models are told by it how much to say."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    """effort is honoured where the chat template knows it. Summaries are a hint: reasoning is sent whole."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard"] | None = None


class NamedChoice(Open):
    """The one tool to call."""

    type: Text
    name: Text | None = None
    namespace: Text | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> NamedChoice:
        if self.type in HOSTED:
            raise ValueError(f"{self.type} is run by nobody here, so it can't be required")
        if self.type not in ("function", "custom", "allowed_tools"):
            raise ValueError(f"the type {self.type[:40]!r} is not known; function, custom and allowed_tools are")
        if (self.type == "allowed_tools") != (self.tools is not None) or (self.tools is None) != (self.mode is None):
            raise ValueError('mode and tools go with type "allowed_tools", and must be there')
        if (self.type == "allowed_tools") != (self.name is None):
            raise ValueError("name is missing, or stands where tools are")
        return self


Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(strict=True, max_length=64)],
        Annotated[str, StringConstraints(strict=True, max_length=512)],
    ],
    Field(max_length=16),
]
Input = Annotated[TextOption | Annotated[InputItems, Tag("<list>")], Discriminator(text_or_list)]


def _choice_kind(value: object) -> str:
    return "<text>" if isinstance(value, str) else "<object>"


class InputFields(Strict):
    """What the prompt is made of: shared by /v1/responses and /v1/responses/input_tokens."""

    model: Text | None = None
    input: Input
    instructions: Text | None = None
    tools: (
        Annotated[list[ToolParam], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(bounded_json)] | None
    ) = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedChoice, Tag("<object>")],
            Discriminator(_choice_kind),
        ]
        | None
    ) = None
    parallel_tool_calls: Flag | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    previous_response_id: Name | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # not supported: accepted only where they ask for nothing
    conversation: None = None
    prompt: None = None
    personality: None = None

    @property
    def hosted(self) -> list[str]:
        """The tools that nobody runs here."""
        return [tool.type for tool in self.tools or () if isinstance(tool, HostedParam)]

    @property
    def flat_tools(self) -> list[tuple[str | None, FunctionParam | CustomParam]]:
        """The tools that the model may call, each with its namespace."""
        found: list[tuple[str | None, FunctionParam | CustomParam]] = []
        for tool in self.tools or ():
            if isinstance(tool, NamespaceParam):
                found += [(tool.name, member) for member in tool.tools]
            elif not isinstance(tool, HostedParam):
                found.append((None, tool))
        return found

    @property
    def namespaces(self) -> dict[str, tuple[str, str]]:
        """(namespace, name) of each tool in one, by the name that the model calls it."""
        return {flat_name(tool.name, space): (space, tool.name) for space, tool in self.flat_tools if space}

    @property
    def custom_names(self) -> set[str]:
        """The names of the tools that take free text."""
        return {flat_name(tool.name, space) for space, tool in self.flat_tools if isinstance(tool, CustomParam)}

    @model_validator(mode="after")
    def _check_hosted(self) -> InputFields:
        if self.hosted and self.tool_choice == "required":
            raise field_error(
                "tool_choice",
                f"tool_choice: 'required' with {self.hosted[0]} among the tools, which nobody runs here; leave it out",
            )
        return self


class InputTokensRequest(InputFields):
    """POST /v1/responses/input_tokens."""

    @model_validator(mode="before")
    @classmethod
    def _allow_no_input(cls, fields: Any) -> Any:
        return fields | {"input": []} if isinstance(fields, dict) and fields.get("input") is None else fields


class ResponsesRequest(ResponsesHints, InputFields, NoReasoning, GenerationRequest):
    """POST /v1/responses. vLLM's sampling fields are taken too."""

    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_tool_calls: Annotated[Count, Field(ge=1)] | None = None
    store: Flag | None = None
    background: Flag | None = None
    include: Annotated[list[INCLUDABLE], Field(max_length=64)] | None = None
    top_logprobs: Count | None = None
    metadata: Metadata | None = None
    thinking_token_budget: Annotated[Count, Field(lt=2**31)] | None = None  # vLLM's
    # not supported: accepted only where they ask for nothing
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    response_format: None = None
    prompt_logprobs: None = None
    return_token_ids: Literal[False] | None = None
    return_tokens_as_token_ids: Literal[False] | None = None
    return_prompt_text: Literal[False] | None = None
    truncate_prompt_tokens: None = None
    truncation_side: None = None
    context_management: None = None
    background_options: None = None
    enable_response_messages: Literal[False] | None = None
    moderation: None = None
    access_programs: None = None
    image: None = None

    @model_validator(mode="after")
    def _check_background(self) -> ResponsesRequest:
        if self.background and self.store is False:
            raise field_error("background", "background: a response that isn't stored could never be read")
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            raise field_error("stream_options", "stream_options: the usage comes with the last event alone")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def own_hints(self) -> list[str]:
        """The hints within fields that are honoured otherwise."""
        found = [f"tools.{kind}" for kind in self.hosted]
        found += [f"include.{name}" for name in self.include or () if name.partition(".")[0] in _HOSTED_RESULTS]
        if self.text is not None and self.text.verbosity is not None:
            found.append("text.verbosity")
        reasoning = self.reasoning
        for name in ("summary", "generate_summary", "context", "mode"):
            if reasoning is not None and getattr(reasoning, name) is not None:
                found.append(f"reasoning.{name}")
        return found


_HOSTED_RESULTS = frozenset({"file_search_call", "web_search_call", "computer_call_output", "code_interpreter_call"})
_PASSED = frozenset(GenerationRequest.model_fields) - {"stream", "stream_options", "stream_interval", "n", "best_of"}
_PASSED |= {"parallel_tool_calls", "thinking_token_budget", "chat_template", "chat_template_kwargs"}
_PASSED -= frozenset(ResponsesHints.model_fields)


def chat_request(body: InputFields, messages: Sequence[Json]) -> ChatCompletionRequest:
    """The chat request that asks for the same. Raises ApiError, which names the fields of this one."""
    fields: Json = {name: getattr(body, name) for name in body.model_fields_set if name in _PASSED}
    fields |= {"model": body.model, "messages": list(messages)}
    if isinstance(body, ResponsesRequest) and body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    fields |= _tool_fields(body)
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if isinstance(body, ResponsesRequest) and body.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return chat_request_of(fields, NAMES_IN_CHAT)


def _tool_fields(body: InputFields) -> Json:
    """tools and tool_choice as chat has them; neither where there is no tool that can be called."""
    tools = [_chat_tool(tool, space) for space, tool in body.flat_tools]
    choice = body.tool_choice
    if not tools:
        # 'auto' among hosted tools alone asks for nothing
        return {} if choice in (None, "auto", "none") else {"tool_choice": _chat_choice(choice)}
    return {"tools": tools} | ({} if choice is None else {"tool_choice": _chat_choice(choice)})


def _chat_tool(tool: FunctionParam | CustomParam, space: str | None) -> Json:
    """A custom tool becomes a function of one string, except where a Lark grammar says what it may be."""
    fields: Json = {"name": flat_name(tool.name, space), "description": tool.description}
    if isinstance(tool, FunctionParam):
        fields |= {"parameters": tool.parameters, "strict": tool.strict}
    elif isinstance(tool.format, GrammarInput):
        if tool.format.syntax == "lark":
            grammar = {"syntax": "lark", "definition": tool.format.definition}
            custom = {**fields, "format": {"type": "grammar", "grammar": grammar}}
            return {"type": "custom", "custom": {name: value for name, value in custom.items() if value is not None}}
        fields |= {"parameters": input_schema(tool.format.definition), "strict": True}
    else:
        fields["parameters"] = input_schema(None)
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}


def _chat_choice(choice: str | NamedChoice | None) -> Any:
    if not isinstance(choice, NamedChoice):
        return choice
    if choice.type == "allowed_tools":
        tools = [_chat_named(tool) for tool in choice.tools or ()]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return _chat_named({"type": choice.type, "name": choice.name, "namespace": choice.namespace})


def _chat_named(tool: Json) -> Json:
    name = tool.get("name")
    if isinstance(name, str):
        name = flat_name(name, tool.get("namespace"))
    return {"type": "function", "function": {"name": name}}


def _response_format(format: TextFormat) -> Json:
    if format.type != "json_schema":
        return {"type": format.type}
    schema = {"name": format.name, "description": format.description, "strict": format.strict}
    return {"type": "json_schema", "json_schema": schema | {"schema": format.schema_}}
