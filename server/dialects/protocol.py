"""The requests that clients send: OpenAI's fields, vLLM's extra ones, and nothing else.

A field is either honoured, or accepted at the one value that asks for nothing (`tools: null`, `best_of: 1`), or refused
by name: extra fields are forbidden. What only the model can decide (token ids in the vocabulary, the length that
fits) is checked in server/prompts.py.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from octavo.server.errors import field_error

MAX_CHOICES = 128
MAX_TOKENS_SENT = 1 << 22  # to the engine for one request, where each answer's prompt counts; they take 200 MB there
MAX_ENTRIES = 1024  # of an object; pydantic makes an error of each that is wrong, and they must not fill the memory
MAX_PARTS = 1 << 14  # messages of a conversation, with their parts and calls; each is an object, and takes 5 us
MAX_TEMPLATE_DATA = 1 << 20  # bytes, as JSON, of what goes to the chat template beside the messages
INT64 = 2**63

Text = Annotated[str, StringConstraints(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
StopString = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Field(max_length=32, fail_fast=True)]
Flag = Annotated[bool, Field(strict=True)]


def _number(value: object) -> object:
    """JSON's true is no number, nor is a string of digits; pydantic alone would take both."""
    if isinstance(value, (bool, str)):
        raise ValueError("must be a number")
    return value


def _few(value: Any) -> Any:
    """Not an object of a million entries, each of which would get an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"an object of {len(value)} entries; {MAX_ENTRIES} is the most")
    return value


def _little(value: Any) -> Any:
    """Not megabytes of values, which a chat template would walk over."""
    size = len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_DATA:
        raise ValueError(f"{size} bytes as JSON; {MAX_TEMPLATE_DATA} is the most")
    return value


def _few_parts(value: Any) -> Any:
    """Not a conversation of a million messages, parts and calls."""
    if isinstance(value, list):
        lists = [
            message.get(name) for message in value if isinstance(message, dict) for name in ("content", "tool_calls")
        ]
        count = len(value) + sum(len(parts) for parts in lists if isinstance(parts, list))
        if count > MAX_PARTS:
            raise ValueError(f"{count} messages, parts and calls; {MAX_PARTS} is the most")
    return value


def _text_or_list(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


Number = Annotated[float, BeforeValidator(_number, json_schema_input_type=float), Field(allow_inf_nan=False)]
TextOption = Annotated[Text, Tag("<text>")]
Unsupported = Annotated[list[Any], Field(max_length=0, fail_fast=True)]


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, fields: Any) -> Any:
        return _few(fields)


class StreamOptions(Strict):
    """include_usage: a last chunk with the token counts; continuous_usage_stats: counts in every chunk (vLLM)."""

    include_usage: Flag = False
    continuous_usage_stats: Flag = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    """The only response format there is: free text."""

    type: Literal["text"]


class NoOps(Strict):
    """Fields of OpenAI's and vLLM's that are accepted only at the values that ask for nothing."""

    user: Text | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, Text], BeforeValidator(_few)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    priority: Literal[0] | None = None
    use_beam_search: Literal[False] | None = None
    length_penalty: Literal[1] | None = None
    response_format: TextFormat | None = None
    bad_words: Unsupported | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    structured_outputs: None = None
    # gateways (sglang-router, vllm-router) add these to every request
    no_stop_trim: Literal[False] | None = None
    separate_reasoning: Literal[True] | None = None
    stream_reasoning: Literal[True] | None = None
    return_hidden_states: Literal[False] | None = None
    include_reasoning: Literal[True] | None = None


class GenerationRequest(NoOps):
    """What completions and chat completions have in common."""

    model: Text | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-INT64, lt=INT64)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("<text>")] | Annotated[StopStrings, Tag("<list>")], Discriminator(_text_or_list)
        ]
        | None
    ) = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], BeforeValidator(_few)] | None = None
    # vLLM's own
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1e-6, le=10)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    include_stop_str_in_output: Flag = False
    ignore_eos: Flag = False
    min_tokens: Count = 0
    skip_special_tokens: Flag = True
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
    prompt_logprobs: Count | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=2**18, fail_fast=True)] | None = None
    return_token_ids: Flag | None = None
    cache_salt: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)] | None = None

    @property
    def num_choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="after")
    def _check_combinations(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "stream_options is for stream: true only")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise field_error("best_of", "best_of is supported only where it equals n: nothing is thrown away here")
        if self.stream and self.prompt_logprobs is not None:
            raise field_error("prompt_logprobs", "prompt_logprobs is not available with stream: true")
        if self.truncate_prompt_tokens == 0:
            raise field_error(
                "truncate_prompt_tokens", "truncate_prompt_tokens must be positive, or -1 for what the context holds"
            )
        return self


TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS_SENT, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]


def _kind_of_prompt(value: object) -> str:
    """The first element tells, so that an error is about what was meant."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else None
    return "<texts>" if isinstance(first, str) else "<token lists>" if isinstance(first, list) else "<tokens>"


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. A list of prompts is answered with n choices for each."""

    prompt: Annotated[
        TextOption
        | Annotated[TokenIds, Tag("<tokens>")]
        | Annotated[Texts, Tag("<texts>")]
        | Annotated[TokenLists, Tag("<token lists>")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: Count | None = 16
    logprobs: Count | None = None
    echo: Flag | None = None
    add_special_tokens: Flag = True
    suffix: None = None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise field_error(
                "max_tokens", "max_tokens 0 makes sense with echo: true only, for the prompt's log-probabilities"
            )
        return self


class TextPart(Strict):
    """A piece of a message; images and audio are not supported."""

    type: Literal["text"]
    text: Text


TextParts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class FunctionCall(Strict):
    """What an assistant asked for, in the history of a conversation."""

    name: Text
    arguments: Text


class ToolCall(Strict):
    """One call in an assistant's message; it is shown to the chat template."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """One message. Everything in it goes to the chat template as it is."""

    role: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)]
    content: Annotated[TextOption | Annotated[TextParts, Tag("<list>")], Discriminator(_text_or_list)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Unsupported | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing; only an assistant's message with tool_calls may leave it out")
        return self


class ChatOptions(Strict):
    """How messages become a prompt; shared by chat completions and /tokenize."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), BeforeValidator(_few_parts)]
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False
    chat_template: Text | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_little)] | None = None
    add_special_tokens: Flag = False

    @model_validator(mode="after")
    def _check_ending(self) -> ChatOptions:
        if self.continue_final_message and self.add_generation_prompt:
            raise field_error("continue_final_message", "continue_final_message needs add_generation_prompt: false")
        return self


class ChatCompletionRequest(ChatOptions, GenerationRequest):
    """POST /v1/chat/completions."""

    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Count | None = None
    echo: Flag = False
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True), BeforeValidator(_little)] | None = None
    # not supported: accepted only where they ask for nothing
    tools: Unsupported | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Flag | None = None
    functions: Unsupported | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: None = None
    verbosity: None = None
    thinking_token_budget: None = None
    mm_processor_kwargs: None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs needs logprobs: true")
        return self


class TokenizeCompletionRequest(Strict):
    """POST /tokenize with a text."""

    model: Text | None = None
    prompt: Text
    add_special_tokens: Flag = True
    return_token_strs: Flag | None = None


class TokenizeChatRequest(ChatOptions):
    """POST /tokenize with messages."""

    model: Text | None = None
    return_token_strs: Flag | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS_SENT, fail_fast=True)]


def _kind_of_text(body: object) -> str:
    return "<chat>" if isinstance(body, dict) and "messages" in body else "<text>"


TokenizeRequest = Annotated[
    Annotated[TokenizeCompletionRequest, Tag("<text>")] | Annotated[TokenizeChatRequest, Tag("<chat>")],
    Discriminator(_kind_of_text),
]


class TokenizeResponse(BaseModel):
    """vLLM's shape."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """vLLM's shape."""

    prompt: str
