"""A conversation with a model behind an OpenAI-compatible server: its history, and answers piece by piece.

It knows messages, not terminals. Whoever leaves an answer before its end closes the connection, and the server stops
generating. The part that was answered stays in the history; a turn that ends in an error does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import httpx

from octavo.bench.sse import EventSplitter, error_message, http_error, one_line
from octavo.commands.http_client import http_client, server_url, unreachable


class ChatError(RuntimeError):
    """What went wrong, in one line."""


class ChatServer:
    """A server, over HTTP. `check` is called when it can't be reached, and may raise an error that says why."""

    def __init__(self, url: str, api_key: str | None, check: Callable[[], None] = lambda: None) -> None:
        try:
            self.url = server_url(url)
        except ValueError as e:
            raise ChatError(str(e)) from e
        self._check = check
        # the first token of a long prompt may take its time
        self._client = http_client(self.url, api_key, httpx.Timeout(10.0, read=None))

    def first_model(self) -> str:
        """The first model that the server names."""
        try:
            response = self._client.get(f"{self.url}/v1/models")
            if response.status_code != 200:
                raise ChatError(http_error(response.status_code, response.content))
            return str(response.json()["data"][0]["id"])
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        except (ValueError, TypeError, KeyError, IndexError) as e:
            raise ChatError(f"{self.url}/v1/models names no model; --model does") from e

    def events(self, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The events of a streamed chat completion; closing the iterator closes the connection."""
        splitter = EventSplitter()
        try:
            with self._client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatError(http_error(response.status_code, response.read()))
                for piece in response.iter_bytes():
                    for data in splitter.feed(piece):
                        if data == b"[DONE]":
                            return
                        yield _parsed(data)
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e

    def close(self) -> None:
        """Close the kept connections."""
        self._client.close()

    def _unreachable(self, error: httpx.HTTPError) -> ChatError:
        self._check()
        return ChatError(unreachable(self.url, error))


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise ChatError(f"the server sent an event that is no JSON object: {one_line(data.decode(errors='replace'))}")
    if event.get("error") or event.get("object") == "error":
        raise ChatError(error_message(event) or one_line(data.decode(errors="replace")))
    return event


class Conversation:
    """The messages so far, and how to ask for the next. `options` are fields of the request, such as temperature."""

    def __init__(self, server: ChatServer, model: str, options: dict[str, Any], system: str | None = None) -> None:
        self.model = model
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.finish_reason: str | None = None
        self._server = server
        self._options = options

    def ask(self, question: str) -> Generator[tuple[str, bool]]:
        """Put a question; yields the answer's pieces as (text, whether it is the model's reasoning).

        Closing the iterator, or an interrupt in it, ends the answer early and keeps what came, if anything did.
        """
        turn = {"role": "user", "content": question}
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.model, "messages": [*system, *self.turns, turn], "stream": True, **self._options}
        pieces: list[str] = []
        self.finish_reason = None
        failed = False
        try:
            with closing(self._server.events(body)) as events:
                for event in events:
                    yield from self._pieces(event, pieces)
            if self.finish_reason is None:
                raise ChatError("the connection ended before the answer did")
        except ChatError:
            failed = True
            raise
        finally:
            if not failed and (pieces or self.finish_reason):
                self.turns += [turn, {"role": "assistant", "content": "".join(pieces)}]

    def _pieces(self, event: dict[str, Any], pieces: list[str]) -> Generator[tuple[str, bool]]:
        for choice in (event.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            if reasoning:
                yield reasoning, True
            if content := delta.get("content"):
                pieces.append(content)
                yield content, False
