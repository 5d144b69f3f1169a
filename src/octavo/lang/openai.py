"""OpenAI's API as a backend: chat completions, or completions, of any server that speaks it.

Options that are no fields of that API are refused: many servers pass over fields that they don't know. `extra_body`
says what else a server is to get.
"""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import urlsplit

from octavo.lang.backend import Backend, Context, Generated, Json, OnText
from octavo.lang.ir import Options
from octavo.lang.wire import BackendError, Wire

OPENAI = "https://api.openai.com/v1"
COMPLETION_MODELS = ("gpt-3.5-turbo-instruct",)
FIELDS = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "n")
NEUTRAL: dict[str, object] = {"top_k": -1, "min_p": 0.0, "ignore_eos": False, "return_logprob": False}
"""Options that are no fields, at the values that ask for nothing."""


class OpenAI(Backend):
    """A model behind an OpenAI-compatible server.

    base_url, api_key: by default OPENAI_BASE_URL, else OpenAI's own, and OPENAI_API_KEY. is_chat_model: whether it is
    asked at /chat/completions, where each gen must begin an assistant's turn. extra_body: fields of each request.
    """

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        is_azure: bool = False,
        extra_body: Json | None = None,
        max_connections: int = 64,
    ) -> None:
        if is_azure:
            raise ValueError("is_azure: Azure's own paths are not supported; its OpenAI-compatible base_url is")
        url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self.model_name = model_name
        self.max_connections = max_connections
        self.is_chat_model = model_name not in COMPLETION_MODELS if is_chat_model is None else is_chat_model
        self._limit_name = "max_completion_tokens" if url == OPENAI and self.is_chat_model else "max_tokens"
        self._extra = extra_body or {}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._wire = Wire(url.rstrip("/"), headers, insecure=False, max_connections=max_connections)
        path = urlsplit(url).path.rstrip("/")
        # the client leaves out a /v1 at the end; an address without a path means one
        self._root = "/v1" if not path or path.endswith("/v1") else ""

    async def generate(self, context: Context, options: Options, on_text: OnText | None) -> Generated:
        """Raises BackendError and ValueError."""
        body = {"model": self.model_name, **self._prompt(context), **self._fields(options), **self._extra}
        path = f"{self._root}/chat/completions" if self.is_chat_model else f"{self._root}/completions"
        if on_text is None:
            answer = await self._wire.ask("POST", path, body)
            choices = answer["choices"]
            metas = [self._meta(choice, answer) for choice in choices]
            return Generated([self._text(choice, "message") for choice in choices], metas)
        if options.get("n", 1) > 1:
            raise ValueError("n: a streamed program has one answer to a gen; leave out stream=True, or fork")
        return await self._streamed(path, body, on_text)

    def _prompt(self, context: Context) -> Json:
        if not self.is_chat_model:
            if context.has_turns:
                raise ValueError("turns need a chat model: OpenAI(..., is_chat_model=True)")
            return {"prompt": context.text}
        if context.role != "assistant" or context.text:
            raise ValueError(
                "with a chat API each gen must begin an assistant's turn: sgl.assistant(sgl.gen(...)), and no text "
                "before it in that turn; RuntimeEndpoint, or OpenAI(..., is_chat_model=False), goes on from any text"
            )
        return {"messages": list(context.messages)}

    def _fields(self, options: Options) -> Json:
        fields: Json = {name: options[name] for name in FIELDS if name in options}
        fields[self._limit_name] = options["max_new_tokens"]
        if options.get("stop"):
            fields["stop"] = options["stop"]
        known = {*FIELDS, "max_new_tokens", "stop"}
        if "json_schema" in options and self.is_chat_model:
            known.add("json_schema")
            schema = {"name": "answer", "schema": _object(options["json_schema"]), "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        for name, value in options.items():
            if name not in known and value not in ([], NEUTRAL.get(name)):
                raise ValueError(
                    f"{name} is no field of OpenAI's API; RuntimeEndpoint has it, and OpenAI(..., extra_body=...) "
                    "sends whatever your server knows"
                )
        return fields

    async def _streamed(self, path: str, body: Json, on_text: OnText) -> Generated:
        pieces: list[str] = []
        thoughts: list[str] = []
        meta: Json = {}

        def take(event: Any) -> None:
            for choice in event.get("choices") or []:
                delta = choice.get("delta") or {}
                thoughts.append(delta.get("reasoning_content") or delta.get("reasoning") or "")
                if choice.get("finish_reason"):
                    meta["finish_reason"] = {"type": choice["finish_reason"]}
                if piece := self._text(choice, "delta"):
                    pieces.append(piece)
                    on_text(piece, dict(meta))
            if event.get("usage"):
                meta.update(_usage(event))

        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        await self._wire.stream(path, asked, take)
        if "".join(thoughts):
            meta["reasoning_content"] = "".join(thoughts)
        return Generated(["".join(pieces)], [meta])

    def _text(self, choice: Json, part: str) -> str:
        found = (choice.get(part) or {}).get("content") if self.is_chat_model else choice.get("text")
        return found or ""

    def _meta(self, choice: Json, answer: Json) -> Json:
        message = choice.get("message") or {}
        if message.get("refusal"):
            raise BackendError(f"the model refused: {message['refusal']}")
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        meta = {"id": answer.get("id"), "finish_reason": {"type": choice.get("finish_reason")}, **_usage(answer)}
        return meta | ({"reasoning_content": thoughts} if thoughts else {})


def _usage(answer: Json) -> Json:
    usage = answer.get("usage") or {}
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if name in usage}


def _object(schema: Any) -> Any:
    return json.loads(schema) if isinstance(schema, str) else schema
