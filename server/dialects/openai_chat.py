"""POST /v1/chat/completions: OpenAI's dialect of conversations, with vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, model_validator

from octavo.server.dialects.conversation import (
    ChatOptions,
    bounded_json,
    chat_token_ids,
    render_request,
    rendered,
    text_of_message,
)
from octavo.server.dialects.fields import Count, Flag, GenerationRequest
from octavo.server.dialects.logprobs import chat_logprobs
from octavo.server.dialects.openai import Json, about_prompt, head, request_id_of
from octavo.server.dialects.tools import ToolOptions, message_fields, part_fields, reading_of, shown_tools
from octavo.server.errors import RESPONSES, field_error
from octavo.server.generation import Delta, Reading, make_choices, usage_of
from octavo.server.hints import ChatHints
from octavo.server.message.parts import Part
from octavo.server.prompts import Prompt, Wanted, check_total, fitted
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute


class ChatCompletionRequest(ChatHints, ToolOptions, ChatOptions, GenerationRequest):
    """POST /v1/chat/completions."""

    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Count | None = None
    echo: Flag = False
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True), BeforeValidator(bounded_json)] | None = None
    # not supported: accepted only where they ask for nothing
    functions: None = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: None = None
    thinking_token_budget: None = None
    mm_processor_kwargs: None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs needs logprobs: true")
        return self


def routes(service: Service) -> APIRouter:
    """/v1/chat/completions."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)
    model = service.model

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        """Answer a conversation."""
        service.check(body.model)
        asked = await service.off_loop(
            http, lambda: render_request(body, model, body.documents, shown_tools(body, model))
        )
        text = await rendered(asked, model)
        name = request_id_of(http, body)
        reading = reading_of(text, body, body.messages, model)
        answer = await service.off_loop(
            http,
            lambda: ChatAnswer(body, prompt_of(text, body, model), model, name, reading),
            body.work_of_a_byte,
        )
        return await service.respond(http, answer)

    return router


def wanted_of(request: ChatCompletionRequest) -> Wanted:
    """The limit under its new name, or its old one; log-probabilities as chat asks for them."""
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = request.max_tokens
    limit_name = "max_tokens"
    if request.max_completion_tokens is not None:
        limit = request.max_completion_tokens
        limit_name = "max_completion_tokens"
    return Wanted(limit, logprobs, request.prompt_logprobs, limit_name, "top_logprobs")


def prompt_of(text: str, request: ChatCompletionRequest, model: ServedModel) -> Prompt:
    """The prompt out of the text that the chat template made of the messages."""
    ids = chat_token_ids(text, request, model, must_fit=request.truncate_prompt_tokens is None)
    prompt = Prompt(fitted(ids, request, wanted_of(request), model, "messages"))
    check_total([prompt], request, "messages")
    return prompt


class ChatAnswer:
    """POST /v1/chat/completions."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        prompt: Prompt,
        model: ServedModel,
        name: str,
        reading: Reading | None = None,
    ) -> None:
        self.request = request
        self.choices = make_choices([prompt], request, wanted_of(request), model, reading)
        self._num_calls = [0] * len(self.choices)
        self._model = model
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head = head(f"chatcmpl-{name}", kind, request, model)
        self._role = "assistant"
        self._echo = _last_words(request) if request.echo else ""

    def whole(self, deltas: list[Delta]) -> Json:
        about = self._about_prompt(deltas[0])
        choices = (self._choice(delta) for delta in deltas)
        return {**self._head, "choices": choices, **about, "usage": usage_of(self.choices).as_json()}

    def chunks(self, delta: Delta) -> list[Json]:
        chunks: list[Json] = []
        if delta.is_first:
            start = {"role": self._role, "content": self._echo}
            choice = {"index": delta.index, "delta": start, "logprobs": None, "finish_reason": None}
            chunks.append(self.frame([choice]) | self._about_prompt(delta))
        *earlier, last = [self._said(part, delta.index) for part in delta.parts if part.kind != "call_end"] or [{}]
        for fields in earlier:
            choice = {"index": delta.index, "delta": fields, "logprobs": None, "finish_reason": None}
            chunks.append(self.frame([choice]))
        if last or delta.logprobs or delta.finish_reason is not None or self.request.return_token_ids:
            chunks.append(self.frame([{"index": delta.index, "delta": last, **self._rest(delta)}]))
        return chunks

    def _said(self, part: Part, index: int) -> Json:
        self._num_calls[index] += part.kind == "call"
        return part_fields(part, self._num_calls[index] - 1)

    def frame(self, choices: list[Json]) -> Json:
        return {**self._head, "choices": choices}

    def _choice(self, delta: Delta) -> Json:
        self._num_calls[delta.index] = sum(part.kind == "call" for part in delta.parts)
        message = {"role": self._role, **message_fields(delta.parts, self._echo)}
        return {"index": delta.index, "message": message, **self._rest(delta)}

    def _rest(self, delta: Delta) -> Json:
        logprobs = None
        if self.request.logprobs:
            logprobs = {"content": chat_logprobs(delta.logprobs, self._model.tokenizer)}
        content: Json = {
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(delta),
            "stop_reason": delta.stop_reason,
        }
        if self.request.return_token_ids:
            content["token_ids"] = delta.token_ids
        return content

    def _finish_reason(self, delta: Delta) -> str | None:
        """An answer with calls that has ended by itself waits for their results."""
        waits = delta.finish_reason == "stop" and delta.stop_reason is None and self._num_calls[delta.index] > 0
        return "tool_calls" if waits else delta.finish_reason

    def _about_prompt(self, delta: Delta) -> Json:
        """Beside the choices, which share their prompt."""
        return about_prompt(self.request, delta, self.choices[delta.index].request.token_ids, self._model)


def _last_words(request: ChatCompletionRequest) -> str:
    """What echo puts before the answer, as in vLLM: the last message, if it is an assistant's."""
    last = request.messages[-1]
    if last.role != "assistant":
        return ""
    content = text_of_message(last)
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
