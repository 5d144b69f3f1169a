"""A scripted server with the routes that `octavo bench` asks: /v1/models, /tokenize and completions."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from scripted_server import DONE, Asked, ScriptedServer, delta, event, stream, text, usage, whole

from octavo.bench.prompts import WORDS
from octavo.cli import main

ENGLISH = {"The", *WORDS}
CONTEXT = 4096


def tokens_of(prompt: str, long: str = "") -> int:
    """The scripted server's tokenizer: a beginning token, and one for each word, three for one with `long` in it."""
    return 1 + sum(3 if long and long in word else 1 for word in prompt.split())


def text_of(body: dict[str, Any]) -> str:
    """What the scripted server's model is given: a prompt, or messages through its chat template."""
    if "prompt" in body:
        return str(body["prompt"])
    return "chat template " + " next turn ".join(message["content"] for message in body["messages"])


def server_like_vllm(
    answer: Callable[[Asked], Iterable[bytes] | AsyncIterator[bytes]], long: str = "", tokenize: bool = True
) -> Callable[[Asked], Iterable[bytes] | AsyncIterator[bytes]]:
    """A script with /v1/models, /tokenize, and `answer` for the rest."""

    def script(asked: Asked) -> Iterable[bytes] | AsyncIterator[bytes]:
        if asked.path == "/v1/models":
            return whole({"data": [{"id": "some/model"}]})
        if asked.path == "/tokenize" and tokenize:
            return whole({"count": tokens_of(text_of(asked.json), long), "max_model_len": CONTEXT, "tokens": []})
        if asked.path == "/tokenize":
            return whole({"error": {"message": "Not Found"}}, "404 Not Found")
        return answer(asked)

    return script


def completion(asked: Asked, **details: Any) -> list[bytes]:
    """As many events as tokens were asked for, and the counts."""
    count = asked.json["max_tokens"] if "prompt" in asked.json else asked.json["max_completion_tokens"]
    write = text if "prompt" in asked.json else _said
    events = [event(write(" word")) for _ in range(count - 1)] + [event(write(" end", "length"))]
    return stream([*events, event(usage(tokens_of(text_of(asked.json)), count, **details)), DONE])


def _said(content: str, finish_reason: str | None = None) -> dict[str, Any]:
    return delta(finish_reason, content=content)


def bench(server: ScriptedServer, *options: str) -> int:
    """`octavo bench` against this server; its exit code."""
    return main(["bench", "--base-url", server.url, *options])


def numbers(printed: str) -> dict[str, float]:
    """The report's lines as people parse them: a label that ends in a colon, and a number."""
    lines = (re.fullmatch(r"(.+):\s+([\d.]+)\s*", line) for line in printed.splitlines())
    return {line[1]: float(line[2]) for line in lines if line}


def asked_for_text(server: ScriptedServer) -> list[Asked]:
    """The requests for answers, in the order in which they came."""
    return [asked for asked in server.asked if asked.path.endswith("completions")]
