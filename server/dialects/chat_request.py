"""A conversation to answer: chat completions' request, which all dialects of conversations are turned into.

`begin` is the way from it to the choices that the engine works on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from octavo.server.dialects.conversation import (
    ChatOptions,
    bounded_json,
    chat_token_ids,
    images_of,
    render_request,
    rendered,
)
from octavo.server.dialects.fields import Count, Flag, GenerationRequest, LogprobCount
from octavo.server.dialects.thinking import effort_variables
from octavo.server.dialects.tools import ToolOptions, reading_of, shown_tools
from octavo.server.errors import ApiError, bad_request, explain, field_error
from octavo.server.generation import Choice, make_choices
from octavo.server.hints import ChatHints
from octavo.server.media.prompt import ReadImage
from octavo.server.prompts import Prompt, Wanted, check_total, fitted
from octavo.server.served_model import ServedModel
from octavo.server.service import Service


class ChatCompletionRequest(ChatHints, ToolOptions, ChatOptions, GenerationRequest):
    """POST /v1/chat/completions."""

    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: Flag | None = None
    top_logprobs: LogprobCount | None = None
    echo: Flag = False
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True), BeforeValidator(bounded_json)] | None = None
    # not supported: accepted only where they ask for nothing
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    mm_processor_kwargs: None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs needs logprobs: true")
        return self


def chat_request_of(fields: dict[str, Any], names: Mapping[str, str]) -> ChatCompletionRequest:
    """The conversation that a request of another dialect means. Raises ApiError.

    names: what a field of this request is called in the other dialect, where that isn't the same name.
    """
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        message, param = explain(error.errors(include_url=False), fields)
    raise _renamed(bad_request(message, param), names)


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors within name the fields as another dialect does; see chat_request_of."""
    try:
        yield
    except ApiError as error:
        raise _renamed(error, names) from error


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error with the place in front of its message, `tools.0.function.parameters: ...`, in another dialect's names.

    A name with a dot stands for the end of a place.
    """
    place, colon, rest = error.message.partition(":")
    first, dot, last = place.partition(".")
    for old, new in names.items():
        if "." in old and last.endswith(old):
            last = last.removesuffix(old) + new
            dot = dot if last else ""
    message = names.get(first, first) + dot + last + colon + rest
    param = names.get(error.param or "", error.param)
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


async def begin(body: ChatCompletionRequest, http: Request, service: Service, *, clamps: bool = False) -> list[Choice]:
    """The answers to a conversation at their beginning. Raises ApiError.

    The template is rendered, the prompt tokenized, and the way in which the answer is read decided. clamps: a limit
    of tokens that is more than the context leaves becomes what it leaves.
    """
    service.check(body.model, http)
    model = service.model
    if variables := effort_variables(body, model):
        body = body.model_copy(update={"chat_template_kwargs": variables | (body.chat_template_kwargs or {})})
    images = await images_of(body, model)
    asked = await service.off_loop(http, lambda: render_request(body, model, body.documents, shown_tools(body, model)))
    text = await rendered(asked, model)
    reading = reading_of(text, body, body.messages, model)

    def choices() -> list[Choice]:
        prompt, wanted = prompt_of(text, body, model, images, clamps=clamps)
        return make_choices([prompt], body, wanted, model, reading)

    return await service.off_loop(http, choices, body.work_of_a_byte)


def wanted_of(request: ChatCompletionRequest) -> Wanted:
    """The limit under its new name, or its old one; log-probabilities as chat asks for them."""
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = request.max_tokens
    limit_name = "max_tokens"
    if request.max_completion_tokens is not None:
        limit = request.max_completion_tokens
        limit_name = "max_completion_tokens"
    return Wanted(limit, logprobs, request.prompt_logprobs, limit_name, "top_logprobs")


def prompt_of(
    text: str,
    request: ChatCompletionRequest,
    model: ServedModel,
    images: Sequence[ReadImage] = (),
    *,
    clamps: bool = False,
) -> tuple[Prompt, Wanted]:
    """The prompt out of the text that the chat template made of the messages, and what is wanted of its answer."""
    if images and request.truncate_prompt_tokens is not None:
        raise bad_request("truncate_prompt_tokens: a prompt with images is not cut", "truncate_prompt_tokens")
    ids = chat_token_ids(text, request, model, images, must_fit=request.truncate_prompt_tokens is None)
    wanted = replace(wanted_of(request), clamps=clamps)
    prompt = Prompt(fitted(ids, request, wanted, model, "messages"))
    if images and model.images is not None:
        prompt = replace(prompt, images=model.images.placed(prompt.token_ids, images))
    check_total([prompt], request, "messages")
    return prompt, wanted
