"""Which server is asked, and how: the options that every `octavo bench` command has, with vLLM's names."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octavo.bench.http import Client
from octavo.flags import parse_pair

ENDPOINTS = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    "openai-embeddings": "/v1/embeddings",
}


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The server, as given; `address` and `path` are what it means."""

    base_url: Annotated[
        str,
        Meta(
            description="with or without /v1",
            extra={"group": "the server", "metavar": "URL", "default": "http://HOST:PORT"},
        ),
    ] = ""
    host: Annotated[str, Meta(description="where --base-url is not given")] = "127.0.0.1"
    port: Annotated[int, Meta(description="where --base-url is not given")] = 8000
    backend: Annotated[
        Literal["openai", "openai-chat", "openai-embeddings"],
        Meta(
            description="openai: completions, the prompt as it is; openai-chat: the prompt is a user's message; "
            "openai-embeddings: its vector, of which only E2EL is measured",
            extra={"spellings": {"vllm": "openai", "vllm-chat": "openai-chat"}},
        ),
    ] = "openai"
    endpoint: Annotated[
        str,
        Meta(
            description="path of the requests",
            extra={"metavar": "PATH", "default": "/v1/completions, /v1/chat/completions or /v1/embeddings"},
        ),
    ] = ""
    model: Annotated[
        str | None,
        Meta(
            description="the name that the server knows it by",
            extra={"default": "the first of /v1/models"},
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        Meta(description="that name, where --model is a path, as in vLLM", extra={"default": "--model"}),
    ] = None
    api_key: Annotated[
        str | None,
        Meta(description="sent as a bearer token", extra={"metavar": "KEY", "default": "$OPENAI_API_KEY"}),
    ] = None
    header: Annotated[
        list[tuple[str, str]],
        Meta(
            description="HTTP headers to send with each request",
            extra={"metavar": "NAME=VALUE", "default": "none", "parse_each": parse_pair},
        ),
    ] = []
    insecure: Annotated[bool, Meta(description="don't check the certificate of an https server")] = False
    ready_check_timeout_sec: Annotated[
        float,
        Meta(
            ge=0,
            description="wait so long for the server to answer /v1/models",
            extra={"metavar": "SECONDS", "default": "it must be there"},
        ),
    ] = 0

    @property
    def model_name(self) -> str | None:
        """The model's name in requests, where it is given."""
        return self.served_model_name or self.model

    @property
    def chat(self) -> bool:
        """True if prompts are messages of a user."""
        return self.backend == "openai-chat"

    @property
    def embeddings(self) -> bool:
        """True if prompts are asked for their vectors."""
        return self.backend == "openai-embeddings"

    @property
    def address(self) -> str:
        """The base URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.base_url or f"http://{host}:{self.port}"

    @property
    def path(self) -> str:
        """Where requests go."""
        return self.endpoint or ENDPOINTS[self.backend]

    def client(self) -> Client:
        """A client of this server, with its headers."""
        key = self.api_key or os.environ.get("OPENAI_API_KEY")
        headers = ({"Authorization": f"Bearer {key}"} if key else {}) | dict(self.header)
        return Client(self.address, headers, insecure=self.insecure)
