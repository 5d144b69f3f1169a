"""POST /v1/messages: Anthropic's fields, and the conversation of OpenAI's that they mean.

A turn's blocks become messages in their order: results of calls become messages of the role tool, text, images and
documents a message of the user, thoughts, text and calls one message of the assistant. Successive turns of one role are
one turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from octavo.server.dialects import anthropic_blocks as blocks
from octavo.server.dialects.chat_request import ChatCompletionRequest, chat_request_of
from octavo.server.dialects.conversation import bounded_json
from octavo.server.dialects.fields import (
    Count,
    Flag,
    Integer,
    Number,
    StopString,
    Strict,
    Text,
    TextOption,
    named_twice,
    text_or_list,
)
from octavo.server.dialects.system_turns import SystemTurns, Turn, folded
from octavo.server.dialects.thinking import EFFORTS, takes_effort, thinking_fields
from octavo.server.dialects.tools import MAX_TOOLS, FunctionName
from octavo.server.errors import bad_request, field_error
from octavo.server.hints import AnthropicHints, Hint
from octavo.server.served_model import ServedModel

BILLING = "x-anthropic-billing-header"
CALL_PREFIX = "toolu_"
Json = dict[str, Any]
OPENAI_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "max_completion_tokens": "max_tokens",
    "function.parameters": "input_schema",
    "json_schema.schema": "schema",
}
"""What the fields of the conversation that is made of a request are called in it, for errors."""


class Tool(Strict):
    """A tool of the client's own. One of Anthropic's typed tools is such a tool where it brings its schema."""

    type: Text | None = None
    name: FunctionName
    description: Text | None = None
    input_schema: Annotated[dict[str, Any], Field()] | None = None
    strict: Flag | None = None
    defer_loading: Flag | None = None
    cache_control: Hint = None
    input_examples: Hint = None
    eager_input_streaming: Hint = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Tool:
        if self.input_schema is None and self.type not in (None, "custom"):
            raise ValueError(
                f"tools of type {self.type!r} run on Anthropic's servers, or only Anthropic's models know them; a tool "
                "that brings its input_schema is supported"
            )
        if self.input_schema is None:
            raise ValueError("input_schema is missing")
        return self


class ToolChoice(Strict):
    """Whether the model may, must or must not call a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: Flag | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError('name goes with type "tool", and must be there')
        return self


class Thinking(Strict):
    """Whether the model thinks before it answers, for how many tokens, and whether the answer shows it.

    Without it the model does as its chat template has it. Thoughts are shown as they are, and never summarized.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[Count, Field(ge=1024)] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> Thinking:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError('budget_tokens goes with type "enabled", and must be there')
        return self


class OutputFormat(Strict):
    """The schema that the answer's text must fit."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    """How much the model thinks, and what its answer must look like."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


StopSequences = Annotated[list[StopString], Field(max_length=32, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
System = Annotated[
    TextOption | Annotated[Annotated[list[blocks.TextBlock], Field(fail_fast=True)], Tag("<list>")],
    Discriminator(text_or_list),
]


class CountTokensRequest(AnthropicHints, Strict):
    """POST /v1/messages/count_tokens: what makes the prompt."""

    model: Text | None = None
    messages: Annotated[
        list[blocks.Message], Field(min_length=1, fail_fast=True), BeforeValidator(blocks.bounded_blocks)
    ]
    system: System | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(bounded_json)] | None = (
        None
    )
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None
    container: None = None
    # of the answer, which is not made; MessagesRequest knows them
    max_tokens: Hint = None
    stream: Hint = None
    # vLLM's own
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(bounded_json)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CountTokensRequest:
        names = [tool.name for tool in self.tools or ()]
        twice = named_twice(names)
        if twice is not None:
            raise field_error("tools", f"tools: {twice!r} stands there twice; each tool needs a name of its own")
        choice = self.tool_choice
        if choice is not None and choice.type == "tool" and choice.name not in names:
            raise field_error("tool_choice", f"tool_choice.name: there is no tool {choice.name!r}")
        if choice is not None and choice.type == "any" and not names:
            raise field_error("tool_choice", "tool_choice: 'any' needs tools")
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise field_error("output_format", "output_format is the older name of output_config.format: give one")
        return self


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages. max_tokens above the room that the context leaves is that room."""

    max_tokens: Annotated[Count, Field(ge=1)]
    stop_sequences: StopSequences | None = None
    stream: Flag | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=0, lt=2**31)] | None = None
    # vLLM's own
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    ignore_eos: Flag | None = None
    cache_salt: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1024)] | None = None
    priority: Annotated[Integer, Field(ge=-(2**31), lt=2**31)] | None = None

    @model_validator(mode="after")
    def _check_thinking(self) -> MessagesRequest:
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise field_error("thinking", f"thinking.budget_tokens {budget} must be less than max_tokens")
        return self


_SAMPLING = ("temperature", "top_p", "top_k", "seed", "ignore_eos", "cache_salt", "priority", "stream")


def chat_of(request: CountTokensRequest, takes: SystemTurns, model: ServedModel) -> ChatCompletionRequest:
    """The conversation that a request means. Raises ApiError."""
    given = list(_turns(request))
    if given[-1] == {"role": "assistant", "content": ""}:
        given.pop()  # there is nothing to go on with
    turns = folded(given, takes)
    fields: Json = {
        "model": request.model,
        "messages": turns,
        **_tool_fields(request),
        **_thinking_fields(request, model),
    }
    if isinstance(request.metadata, dict):
        fields["user"] = request.metadata.get("user_id")
    if turns[-1]["role"] == "assistant":  # the answer goes on with what it says
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    format_ = request.output_format or (request.output_config and request.output_config.format)
    if format_:
        schema = {"name": "output", "schema": format_.schema_, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(request, MessagesRequest):
        fields |= {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
        fields["max_tokens"] = request.max_tokens
        fields["stop"] = request.stop_sequences or None
    return chat_request_of(fields, OPENAI_NAMES)


def _tool_fields(request: CountTokensRequest) -> Json:
    shown = _shown_tools(request)
    choice = request.tool_choice
    must_call = choice is not None and choice.type in ("any", "tool")
    if choice is not None and must_call and (choice.name or "") not in ("", *(tool.name for tool in shown)):
        raise bad_request(f"tool_choice.name: the tool {choice.name!r} may not be called by now", "tool_choice")
    if must_call and not shown:
        raise bad_request("tool_choice: no tool may be called by now", "tool_choice")
    if not shown:
        return {}
    fields: Json = {"tools": [_function(tool) for tool in shown]}
    if choice is None:
        return fields
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if choice.type == "tool":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    return fields


def _function(tool: Tool) -> Json:
    function: Json = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _shown_tools(request: CountTokensRequest) -> list[Tool]:
    """The tools that the model may call by now: a deferred one is shown when the conversation has come upon it."""
    tools = list(request.tools or ())
    shown = {tool.name for tool in tools if not tool.defer_loading}
    known = {tool.name for tool in tools}
    for block in _all_blocks(request.messages):
        match block:
            case blocks.ToolReferenceBlock():
                _check_known(block.tool_name, known)
                shown.add(block.tool_name)
            case blocks.ToolAdditionBlock():
                _check_known(block.tool.name, known)
                shown.add(block.tool.name)
            case blocks.ToolRemovalBlock():
                shown.discard(block.tool.name)
    if tools and not shown and all(tool.defer_loading for tool in tools):
        raise bad_request("tools: all of them have defer_loading, so none could ever be called", "tools")
    return [tool for tool in tools if tool.name in shown]


def _check_known(name: str, known: set[str]) -> None:
    if name not in known:
        raise bad_request(f"messages: a block names the tool {name[:128]!r}, which is not among the tools", "messages")


def _all_blocks(messages: Iterable[blocks.Message]) -> Iterator[Any]:
    for message in messages:
        for block in message.blocks:
            yield block
            if isinstance(block, blocks.ToolResultBlock) and isinstance(block.content, list):
                yield from block.content


def _thinking_fields(request: CountTokensRequest, model: ServedModel) -> Json:
    """The template's own switch, where it has one; a model that can't think keeps to any budget."""
    fields: Json = {}
    thinking = request.thinking
    if thinking is not None and thinking.type != "adaptive":
        fields = thinking_fields(model, "thinking", wants=thinking.type == "enabled")
        if thinking.budget_tokens is not None:
            fields["thinking_token_budget"] = thinking.budget_tokens
    variables = fields.get("chat_template_kwargs", {})
    effort = request.output_config.effort if request.output_config is not None else None
    if effort is not None and takes_effort(model):
        variables["reasoning_effort"] = EFFORTS[effort]
    variables |= request.chat_template_kwargs or {}
    return fields | {"chat_template_kwargs": variables} if variables else fields


def _turns(request: CountTokensRequest) -> Iterator[Turn]:
    """The messages of OpenAI's that the request's are, the system prompt in front."""
    names: dict[str, str] = {}
    merged: list[tuple[str, list[Any]]] = []
    if request.system is not None:
        system = request.system
        texts = [blocks.TextBlock(type="text", text=system)] if isinstance(system, str) else system
        merged.append(("system", list(texts)))
    last_user = max((number for number, each in enumerate(request.messages) if each.role == "user"), default=-1)
    for number, message in enumerate(request.messages):
        if message.clear_at == "next_user_message" and number < last_user:
            continue
        if merged and merged[-1][0] == message.role:
            merged[-1][1].extend(message.blocks)
        else:
            merged.append((message.role, message.blocks))
    for role, content in merged:
        if role == "system":
            text = _system_text(content)
            if text:
                yield {"role": "system", "content": text}
        elif role == "assistant":
            yield _assistant_turn(content, names)
        else:
            yield from _user_turns(content, names)


def _system_text(content: Sequence[Any]) -> str:
    texts = [_without_billing(block.text) for block in content if isinstance(block, blocks.TextBlock)]
    return "\n".join(text for text in texts if text)


def _without_billing(text: str) -> str:
    """The text less the line by which Claude Code is billed: it changes with each request, and so loses the cache."""
    if not text.startswith(BILLING):
        return text
    return text.partition("\n")[2]


def _assistant_turn(content: Sequence[Any], names: dict[str, str]) -> Turn:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for block in content:
        match block:
            case blocks.TextBlock():
                texts.append(block.text)
            case blocks.ThinkingBlock():
                thoughts.append(block.thinking)
            case blocks.ToolUseBlock():
                names[block.id] = block.name
                arguments = msgspec.json.encode(block.input).decode()
                function = {"name": block.name, "arguments": arguments}
                calls.append({"id": _model_id(block.id), "type": "function", "function": function})
    turn: Turn = {"role": "assistant", "content": _content([_part(text) for text in texts])}
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _user_turns(content: Sequence[Any], names: dict[str, str]) -> Iterator[Turn]:
    parts: list[Json] = []
    for block in content:
        if not isinstance(block, blocks.ToolResultBlock):
            parts += _parts_of(block)
            continue
        if parts:
            yield {"role": "user", "content": _content(parts)}
            parts = []
        yield _tool_turn(block, names)
    if parts or not content:
        yield {"role": "user", "content": _content(parts)}


def _tool_turn(block: blocks.ToolResultBlock, names: dict[str, str]) -> Turn:
    parts: list[Json] = []
    if isinstance(block.content, str):
        parts = [_part(block.content)]
    elif block.content is not None:
        parts = [part for inner in block.content for part in _parts_of(inner)]
    content: str | list[Json] = parts
    if all(part["type"] == "text" for part in parts):
        content = ("Error: " if block.is_error else "") + "\n".join(part["text"] for part in parts)
    elif block.is_error:
        content = [_part("Error: "), *parts]
    turn: Turn = {"role": "tool", "tool_call_id": _model_id(block.tool_use_id), "content": content}
    if block.tool_use_id in names:
        turn["name"] = names[block.tool_use_id]
    return turn


def _parts_of(block: Any) -> list[Json]:
    match block:
        case blocks.TextBlock():
            return [_part(block.text)]
        case blocks.ImageBlock():
            return [{"type": "image_url", "image_url": block.source.url}]
        case blocks.DocumentBlock():
            texts = (block.title, block.context, *_source_texts(block.source))
            return [_part("\n".join(text for text in texts if text))]
        case blocks.SearchResultBlock():
            return [_part("\n".join([block.title, block.source, *(part.text for part in block.content)]))]
        case blocks.ToolReferenceBlock():
            return [_part(f"The tool {block.tool_name} is available now.")]
        case _:
            return []


def _source_texts(source: Any) -> list[str]:
    if isinstance(source, blocks.TextSource):
        return [source.data]
    content: str | list[blocks.TextBlock] = source.content
    return [content] if isinstance(content, str) else [part.text for part in content]


def _part(text: str) -> Json:
    return {"type": "text", "text": text}


def _content(parts: Sequence[Json]) -> str | list[Json]:
    if len(parts) < 2 and all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return list(parts)


def call_id_of(call_id: str) -> str:
    """The id of a call as Anthropic writes it; `_model_id` undoes it, since some templates check a call's id."""
    return CALL_PREFIX + call_id.removeprefix("call_")


def _model_id(call_id: str) -> str:
    if not call_id.startswith(CALL_PREFIX):
        return call_id
    own = call_id.removeprefix(CALL_PREFIX)
    return own if len(own) == 9 or ":" in own else f"call_{own}"
