"""POST /v1/chat/completions: OpenAI's dialect of conversations, with vLLM's fields."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from octavo.server.dialects.chat_request import ChatCompletionRequest, begin
from octavo.server.dialects.conversation import text_of_message
from octavo.server.dialects.custom_input import InputText
from octavo.server.dialects.logprobs import chat_logprobs
from octavo.server.dialects.openai import Json, OpenAIAnswer, about_prompt, head, names_ids, request_id_of
from octavo.server.dialects.thinking import ShownReasoning
from octavo.server.dialects.tools import custom_fields, finish_reason_of, message_fields, part_fields
from octavo.server.errors import EVENTS, RESPONSES
from octavo.server.generation import Choice, Delta, drafted_of, usage_of
from octavo.server.message.parts import Part
from octavo.server.served_model import ServedModel
from octavo.server.service import Service
from octavo.server.strict_json import StrictRoute


def routes(service: Service) -> APIRouter:
    """/v1/chat/completions."""
    router = APIRouter(route_class=StrictRoute, responses=RESPONSES)

    @router.post("/v1/chat/completions", responses=EVENTS)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        """Answer a conversation."""
        choices = await begin(body, http, service)
        return await service.respond(http, ChatAnswer(body, choices, service.model, request_id_of(http, body)))

    return router


class ChatAnswer(OpenAIAnswer):
    """POST /v1/chat/completions."""

    def __init__(self, request: ChatCompletionRequest, choices: list[Choice], model: ServedModel, name: str) -> None:
        super().__init__(request, choices, model)
        self._asked = request
        self._num_calls = [0] * len(choices)
        self._inputs: list[InputText | None] = [None] * len(choices)
        self._reasoning = [ShownReasoning(request) for _ in choices]
        self._model = model
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head = head(f"chatcmpl-{name}", kind, request, model)
        self._role = "assistant"
        self._names_ids = names_ids(request, model)
        self._echo = _last_words(request) if request.echo else ""

    def whole(self, deltas: list[Delta]) -> Json:
        about = self._about_prompt(deltas[0])
        choices = (self._choice(delta) for delta in deltas)
        usage = usage_of(self.choices).as_json()
        return {**self._head, "choices": choices, **about, "usage": usage, **drafted_of(self.choices)}

    def chunks(self, delta: Delta) -> list[Json]:
        chunks: list[Json] = []
        if delta.is_first:
            start = {"role": self._role, "content": self._echo}
            choice = {"index": delta.index, "delta": start, "logprobs": None, "finish_reason": None}
            chunks.append(self.frame([choice]) | self._about_prompt(delta))
        shown = self._reasoning[delta.index].shown(delta.parts, is_last=delta.finish_reason is not None)
        *earlier, last = [self._said(part, delta.index) for part in shown if part.kind != "call_end"] or [{}]
        for fields in filter(None, earlier):
            choice = {"index": delta.index, "delta": fields, "logprobs": None, "finish_reason": None}
            chunks.append(self.frame([choice]))
        if last or delta.logprobs or delta.finish_reason is not None or self.request.return_token_ids:
            chunks.append(self.frame([{"index": delta.index, "delta": last, **self._rest(delta)}]))
        return chunks

    def _said(self, part: Part, index: int) -> Json:
        if part.kind == "call":
            self._num_calls[index] += 1
            self._inputs[index] = InputText() if part.text in self._asked.customs else None
        text = self._inputs[index]
        if text is not None and part.kind in ("call", "arguments"):
            return custom_fields(part, self._num_calls[index] - 1, text)
        return part_fields(part, self._num_calls[index] - 1, self._asked)

    def frame(self, choices: list[Json]) -> Json:
        return {**self._head, "choices": choices}

    def _choice(self, delta: Delta) -> Json:
        self._num_calls[delta.index] = sum(part.kind == "call" for part in delta.parts)
        parts = self._reasoning[delta.index].shown(delta.parts, is_last=True)
        message = {"role": self._role, **message_fields(parts, self._echo, self._asked)}
        return {"index": delta.index, "message": message, **self._rest(delta)}

    def _rest(self, delta: Delta) -> Json:
        logprobs = None
        if self._asked.logprobs:
            logprobs = {"content": chat_logprobs(delta.logprobs, self._model.tokenizer, as_ids=self._names_ids)}
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
        if delta.stop_reason is not None or not self._num_calls[delta.index]:
            return delta.finish_reason
        return finish_reason_of(delta.finish_reason, self._asked)

    def _about_prompt(self, delta: Delta) -> Json:
        """Beside the choices, which share their prompt."""
        return about_prompt(self.request, delta, self.choices[delta.index].request.prompt_ids, self._model)


def _last_words(request: ChatCompletionRequest) -> str:
    """What echo puts before the answer, as in vLLM: the last message, if it is an assistant's."""
    last = request.messages[-1]
    if last.role != "assistant":
        return ""
    content = text_of_message(last)
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)
