"""Anthropic's Messages API as a backend. A program without turns is one turn of a user's."""

from __future__ import annotations

import os
from typing import Any

from octavo.lang.backend import Backend, Context, Generated, Json, OnText, urls_of
from octavo.lang.ir import Options
from octavo.lang.wire import BackendError, Wire

ANTHROPIC = "https://api.anthropic.com"
VERSION = "2023-06-01"  # of the API; there is no other
FIELDS = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
NEUTRAL: dict[str, object] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "ignore_eos": False,
    "return_logprob": False,
    "n": 1,
}
"""Values that ask for nothing. They are left out: some models refuse temperature and top_p together."""


class Anthropic(Backend):
    """A model behind Anthropic's API.

    api_key, base_url: by default ANTHROPIC_API_KEY, and ANTHROPIC_BASE_URL, else Anthropic's own.
    """

    def __init__(
        self,
        model_name: str,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        max_connections: int = 64,
    ) -> None:
        url = base_url or os.environ.get("ANTHROPIC_BASE_URL") or ANTHROPIC
        key = api_key or os.environ.get("ANTHROPIC_API_KEY")
        self.model_name = model_name
        self.max_connections = max_connections
        headers = {"anthropic-version": VERSION} | ({"x-api-key": key} if key else {})
        self._wire = Wire(url.rstrip("/"), headers, insecure=False, max_connections=max_connections)

    async def generate(self, context: Context, options: Options, on_text: OnText | None) -> Generated:
        """Raises BackendError and ValueError."""
        body = {"model": self.model_name, **_prompt(context), **_fields(options)}
        if on_text is not None:
            return await self._streamed(body, on_text)
        answer = await self._wire.ask("POST", "/v1/messages", body)
        blocks = answer["content"]
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        thoughts = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
        return Generated([text], [_meta(answer.get("id"), answer["stop_reason"], answer.get("usage") or {}, thoughts)])

    async def _streamed(self, body: Json, on_text: OnText) -> Generated:
        pieces: list[str] = []
        thoughts: list[str] = []
        usage: Json = {}
        about: Json = {}

        def take(event: Any) -> None:
            match event:
                case {"type": "content_block_delta", "delta": {"type": "text_delta", "text": str(text)}}:
                    pieces.append(text)
                    on_text(text, {})
                case {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": str(text)}}:
                    thoughts.append(text)
                case {"type": "message_start", "message": dict(message)}:
                    about["id"] = message.get("id")
                    usage.update(message.get("usage") or {})
                case {"type": "message_delta", "delta": dict(delta)}:
                    about["reason"] = delta.get("stop_reason")
                    usage.update(event.get("usage") or {})

        await self._wire.stream("/v1/messages", {**body, "stream": True}, take)
        meta = _meta(about.get("id"), about.get("reason"), usage, "".join(thoughts))
        return Generated(["".join(pieces)], [meta])


def _prompt(context: Context) -> Json:
    """Messages, the system's apart. A turn that an assistant has begun is its last message, and goes on."""
    if not context.has_turns:
        return {"messages": [{"role": "user", "content": context.text}]}
    if context.role != "assistant":
        raise ValueError("with a chat API each gen must stand in an assistant's turn: sgl.assistant(sgl.gen(...))")
    of_system = [message["content"] for message in context.messages if message["role"] == "system"]
    if any(map(urls_of, of_system)):
        raise ValueError("an image stands in a system's turn, where Anthropic's API has no place for it")
    system = "\n\n".join(of_system)
    messages = [
        {**message, "content": _blocks(message["content"])}
        for message in context.messages
        if message["role"] != "system"
    ]
    if context.text:
        messages.append({"role": "assistant", "content": context.text})
    return {"messages": messages} | ({"system": system} if system else {})


def _blocks(content: str | list[Json]) -> str | list[Json]:
    """A turn's content in Anthropic's form."""
    if isinstance(content, str):
        return content
    return [
        part if part["type"] == "text" else {"type": "image", "source": _source(*urls_of([part]))} for part in content
    ]


def _source(url: str) -> Json:
    head, comma, data = url.partition(";base64,")
    if not comma:
        return {"type": "url", "url": url}
    return {"type": "base64", "media_type": head.removeprefix("data:"), "data": data}


def _fields(options: Options) -> Json:
    asked = {name: value for name, value in options.items() if value not in ([], NEUTRAL.get(name))}
    fields = {FIELDS[name]: value for name, value in asked.items() if name in FIELDS}
    if stop := asked.pop("stop", None):
        fields["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    for name in asked:
        if name not in FIELDS:
            raise ValueError(f"{name} is no field of Anthropic's API; RuntimeEndpoint has it")
    return fields


def _meta(name: Any, reason: Any, usage: Json, thoughts: str) -> Json:
    if reason == "refusal":
        raise BackendError("the model refused to answer")
    meta = {
        "id": name,
        "finish_reason": {"type": reason},
        "prompt_tokens": usage.get("input_tokens"),
        "completion_tokens": usage.get("output_tokens"),
    }
    return meta | ({"reasoning_content": thoughts} if thoughts else {})
