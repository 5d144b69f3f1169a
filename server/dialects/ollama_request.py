"""POST /api/chat and /api/generate: Ollama's fields, and the conversation of OpenAI's that they mean."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from octavo.server.dialects.chat_request import ChatCompletionRequest, chat_request_of
from octavo.server.dialects.conversation import MAX_PARTS, bounded_json, bounded_parts
from octavo.server.dialects.fields import (
    Count,
    Flag,
    Integer,
    Number,
    Open,
    StopString,
    StopStrings,
    Strict,
    Text,
    text_or_list,
)
from octavo.server.dialects.system_turns import SystemTurns, Turn, folded
from octavo.server.dialects.thinking import EFFORTS, can_think, takes_effort, thinking_fields
from octavo.server.dialects.tools import Tool
from octavo.server.errors import bad_request, field_error
from octavo.server.hints import OllamaHints, OllamaOptionHints
from octavo.server.served_model import ServedModel

Json = dict[str, Any]
Images = Annotated[list[Text], Field(max_length=MAX_PARTS, fail_fast=True)]
Think = bool | Literal["low", "medium", "high"]
OPENAI_NAMES = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
    "json_schema.schema": "",
}
"""What the fields of the conversation that is made of a request are called in it, for errors."""


class Options(OllamaOptionHints, Strict):
    """How to sample. Those that octavo's sampler has no counterpart for are taken only where they ask for nothing."""

    num_predict: Annotated[Integer, Field(ge=-2, lt=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, lt=2**31)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Number, Field(ge=1e-6, le=10)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("<text>")] | Annotated[StopStrings, Tag("<list>")], Discriminator(text_or_list)
        ]
        | None
    ) = None
    repeat_last_n: Annotated[Integer, Field(ge=-1, lt=2**31)] | None = None
    typical_p: Literal[1] | None = None
    tfs_z: Literal[1] | None = None
    mirostat: Literal[0] | None = None
    mirostat_tau: Number | None = None
    mirostat_eta: Number | None = None
    penalize_newline: Literal[True] | None = None
    vocab_only: Literal[False] | None = None
    logits_all: Literal[False] | None = None
    embedding_only: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_window(self) -> Options:
        penalties = (self.repeat_penalty or 1) != 1 or self.presence_penalty or self.frequency_penalty
        if penalties and self.repeat_last_n not in (None, -1):
            raise ValueError(
                "repeat_last_n: penalties count all of the text here, the prompt's too for repeat_penalty; only -1 is "
                "supported beside them"
            )
        return self

    def fields(self) -> Json:
        """The same under OpenAI's and vLLM's names."""
        found = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed if self.seed is not None and self.seed >= 0 else None,
            "stop": self.stop or None,
            "max_tokens": self.limit,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer; None: what the context leaves."""
        return self.num_predict if self.num_predict is not None and self.num_predict > 0 else None


class FunctionCall(Open):
    """A call's name, and its arguments as an object."""

    name: Text
    arguments: Annotated[dict[str, Any], BeforeValidator(bounded_json), Field(default_factory=dict)]


class ToolCall(Open):
    """A call that the assistant made."""

    id: Text | None = None
    function: FunctionCall


class Message(Open):
    """One message of a conversation."""

    role: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)]
    content: Text = ""
    thinking: Text | None = None
    images: Images | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_name: Text | None = None
    tool_call_id: Text | None = None


def _schema(value: object) -> object:
    if value not in (None, "", "json") and not isinstance(value, dict):
        raise ValueError('must be "json", or a JSON Schema as an object')
    return value


def _think(value: object) -> object:
    if isinstance(value, bool) or value in ("low", "medium", "high"):
        return value
    raise ValueError("must be true, false, low, medium or high")


class GenerationFields(OllamaHints, Strict):
    """What chat and generate have in common."""

    model: Text
    stream: Flag | None = None  # unless it is false, the answer comes as a stream
    options: Options | None = None
    format: Annotated[Any, BeforeValidator(_schema)] = None
    think: Annotated[Think, BeforeValidator(_think)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Count | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> GenerationFields:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs needs logprobs: true")
        return self


Messages = Annotated[list[Message], Field(fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=512, fail_fast=True)]


class ChatRequest(GenerationFields):
    """POST /api/chat. Without messages it asks only that the model be loaded."""

    messages: Annotated[Messages, BeforeValidator(bounded_parts)] | None = None
    tools: Annotated[Tools, BeforeValidator(bounded_json)] | None = None


class GenerateRequest(GenerationFields):
    """POST /api/generate. raw: the prompt as it is, without the chat template. Without a prompt: load the model."""

    prompt: Text = ""
    suffix: Text = ""
    system: Text = ""
    raw: Flag = False
    images: Images | None = None
    template: Literal[""] | None = None
    context: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check_raw(self) -> GenerateRequest:
        if self.raw and (self.system or self.think is not None or self.images):
            raise field_error(
                "raw", "raw: the prompt goes to the model as it is; system, think and images need the template"
            )
        if self.suffix and self.images:
            raise field_error("images", "images: a prompt with a suffix has none")
        return self


def chat_of(request: ChatRequest | GenerateRequest, takes: SystemTurns, model: ServedModel) -> ChatCompletionRequest:
    """The conversation that a request means. Raises ApiError."""
    if isinstance(request, ChatRequest):
        turns = list(_turns(request.messages or []))
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    else:
        turns = [{"role": "user", "content": _content(request.prompt, request.images)}]
        if request.system:
            turns.insert(0, {"role": "system", "content": request.system})
        tools = []
    fields: Json = {"model": request.model, "messages": folded(turns, takes), **shared_fields(request)}
    if tools:
        fields["tools"] = tools
    if turns[-1]["role"] == "assistant":
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    if request.think is not None:
        fields |= _thinking_fields(request.think, model)
    if request.logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    return chat_request_of(fields, OPENAI_NAMES)


def shared_fields(request: GenerationFields) -> Json:
    """The fields that the answer to a raw prompt has as well."""
    fields: Json = {} if request.options is None else request.options.fields()
    if request.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif request.format:
        schema = {"name": "format", "schema": request.format}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _thinking_fields(think: Think, model: ServedModel) -> Json:
    if think and not can_think(model):
        raise bad_request(f"think: {model.name!r} does not support thinking", "think")
    if isinstance(think, str) and takes_effort(model):
        return {"chat_template_kwargs": {"reasoning_effort": EFFORTS[think]}}
    return thinking_fields(model, "think", wants=bool(think))


def _turns(messages: Sequence[Message]) -> Iterator[Turn]:
    """OpenAI's messages. Calls need no ids in Ollama's API: results without them come in the order of the calls."""
    open_calls: deque[tuple[str, str]] = deque()
    num_calls = 0
    for message in messages:
        turn: Turn = {"role": message.role, "content": _content(message.content, message.images)}
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            open_calls.clear()
            turn["tool_calls"] = []
            for call in message.tool_calls:
                call_id = call.id or f"call_{num_calls:024x}"
                num_calls += 1
                open_calls.append((call_id, call.function.name))
                arguments = msgspec.json.encode(call.function.arguments).decode()
                function = {"name": call.function.name, "arguments": arguments}
                turn["tool_calls"].append({"id": call_id, "type": "function", "function": function})
        if message.role == "tool":
            call_id, name = _call_of(message, open_calls)
            if call_id:
                turn["tool_call_id"] = call_id
            if name:
                turn["name"] = name
        yield turn


def _content(text: str, images: Sequence[str] | None) -> str | list[Json]:
    """Text, or its images, which are base64 without a word of what they are, and the text behind them."""
    if not images:
        return text
    parts: list[Json] = [{"type": "image_url", "image_url": f"data:;base64,{image}"} for image in images]
    return [*parts, {"type": "text", "text": text}] if text else parts


def _call_of(result: Message, open_calls: deque[tuple[str, str]]) -> tuple[str, str]:
    """Which call a result belongs to: by its id, else the first one of that name, else the first one."""
    name = result.tool_name or ""
    for call in open_calls:
        if result.tool_call_id == call[0] or (result.tool_call_id is None and name in ("", call[1])):
            open_calls.remove(call)
            return call
    return result.tool_call_id or "", name
