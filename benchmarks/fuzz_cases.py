"""Malformed requests: each function makes one kind, out of a random generator, as the bytes that go on the wire."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

JSON_TYPE = (("Content-Type", "application/json"),)
PROMPT = "The capital of France is"

VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "logprobs": 1, "stop": ["zzz"], "n": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": False,
    },
    "/tokenize": {"prompt": PROMPT},
    "/detokenize": {"tokens": [1, 2, 3]},
}
# Values of the wrong kind for every field; a number that is one is judged by `absurd` instead.
STRANGE: tuple[Any, ...] = (
    {}, [], [[]], {"a": {"b": []}}, [None], [[[1]]], "", "\x00", "\ud800", "9" * 400, "nan", True, False, -1, -(2**31),
    2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 1e-320, 0.5, float("nan"), float("inf"), float("-inf"),
    "𝔘𝔫𝔦" * 50, "\u202e",
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k",
    "min_p", "n", "best_of", "stream", "stream_options", "stop", "stop_token_ids", "seed", "logprobs", "top_logprobs",
    "prompt_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids",
    "ignore_eos", "echo", "suffix", "user", "tools", "tool_choice", "response_format", "chat_template",
    "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "truncate_prompt_tokens", "request_id",
    "documents", "return_token_ids", "skip_special_tokens", "add_special_tokens", "priority",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One request. `refused`: it can't be right, so that an answer of 200 is a finding as well as one of 500."""

    kind: str
    path: str
    body: bytes
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = JSON_TYPE
    refused: bool = False
    hang_up_after: int | None = None  # bytes of the answer to read before the connection is dropped
    send_only: int | None = None  # bytes of the body that are sent, of the Content-Length that was said
    raw: bytes | None = field(default=None, repr=False)  # instead of all of the above


def mutated(rng: random.Random) -> Case:
    """A valid body with one to three values, anywhere in it, exchanged for strange ones, dropped or doubled."""
    path = rng.choice(list(VALID))
    body = copy.deepcopy(VALID[path]) | _streaming(rng, path)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(_places(body))
        what = rng.random()
        if what < 0.6:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))  # one that is mutated next must not be all of them
        elif what < 0.8 and isinstance(holder, dict):
            holder.pop(key, None)
        else:
            holder[key] = [holder[key]] * rng.choice((1, 2, 100))
        if not body:
            break
    return Case("mutated", path, _encode(body))


def strange_field(rng: random.Random) -> Case:
    """A valid body and one of the fields that servers know, with a value of some other kind."""
    path = rng.choice(("/v1/completions", "/v1/chat/completions"))
    strange = {rng.choice(FIELDS): rng.choice(STRANGE)}
    return Case("strange field", path, _encode(VALID[path] | _streaming(rng, path) | strange))


def unknown_field(rng: random.Random) -> Case:
    path = rng.choice(list(VALID))
    name = rng.choice(("temprature", "max_token", "Model", "prompt ", "__proto__", "x" * 2000, "", "regex", "\x00"))
    return Case("unknown field", path, _encode(VALID[path] | {name: rng.choice(STRANGE[:6])}), refused=True)


def absurd(rng: random.Random) -> Case:
    """Numbers that no field allows."""
    field_name, values = rng.choice(
        (
            ("temperature", (-0.1, 2.1, 1e9, float("nan"), float("inf"), -float("inf"), "1")),
            ("top_p", (0, -1, 1.0001, float("nan"), 1e300)),
            ("min_p", (-0.1, 1.1, float("nan"))),
            ("max_tokens", (-1, 2**31, 2**63, 10**30, 1.5, "3", float("nan"))),
            ("n", (0, -1, 129, 2**31, 1.5)),
            ("logprobs", (-1, 10**6, 2**40)),
            ("seed", (2**63, -(2**63) - 1, 10**40, 1.5, "0")),
            ("presence_penalty", (-2.1, 2.1, float("nan"))),
            ("repetition_penalty", (0, -1, float("inf"))),
            ("top_k", (-2, 2**31, 0.5)),
            ("min_tokens", (-1, 10**9)),
            ("stop_token_ids", ([-1], [2**31], [10**9], [1.5], ["1"])),
            ("allowed_token_ids", ([], [-1], [10**9])),
            ("logit_bias", ({"-1": 1}, {"999999999": 1}, {"a": 1}, {"1": 101}, {"1": float("nan")}, {"1": None})),
            ("logit_bias", ({str(i): 1 for i in range(5000)}, {"1" * 500: 1}, {"१": 1}, {"+1": 1}, {" 1": 1})),
            ("prompt", ([-1], [10**9], [2**31], [2**70], [1.5], [True], [[1], "a"], [[]], [], [None], {"a": 1})),
            ("prompt", ([3] * 100_000, "word " * 60_000)),
            ("stop", ([""], [1], "", ["a"] * 1000, {"a": 1}, ["x" * 100_000])),
            ("stream", ("true", 1, "NoneType")),
            ("stream_options", ({"include_usage": True}, {"x": 1}, [])),
            ("model", (1, ["a"], "no-such-model", "../../etc/passwd", "", "\x00")),
        )
    )
    return Case(
        "absurd", "/v1/completions", _encode(VALID["/v1/completions"] | {field_name: rng.choice(values)}), refused=True
    )


def absurd_messages(rng: random.Random) -> Case:
    messages: Any = rng.choice(
        (
            [],
            {},
            "hello",
            None,
            [[]],
            [{}],
            [{"role": "user"}],
            [{"content": "x"}],
            [{"role": 1, "content": "x"}],
            [{"role": "user", "content": 1}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "user", "content": "x", "extra": 1}],
            [None],
            [{"role": "", "content": "x"}],
            [{"role": "user", "content": []}],
            [{"role": "user", "content": None}],
            [{"role": "user", "content": "word " * 60_000}],
        )
    )
    body = VALID["/v1/chat/completions"] | {"messages": messages}
    return Case("absurd messages", "/v1/chat/completions", _encode(body), refused=True)


def not_json(rng: random.Random) -> Case:
    """Truncated, doubled and garbled bodies; wrong encodings; bodies that are JSON of another kind."""
    path = rng.choice(list(VALID))
    body = _encode(VALID[path])
    cut = rng.randrange(len(body) - 1)
    garbled = bytearray(body)
    garbled[0] = rng.choice(b"\x00\xff[}x")
    bodies = (
        body[:cut],
        bytes(garbled),
        body + body,
        b"",
        b"\xff\xfe" + body.decode().encode("utf-16-le"),
        b"null",
        b"[]",
        b'""',
        b"1e9999",
        b"NaN",
        b"[" * 100_000,
        b'{"prompt":' * 20_000,
        b"[" * 500 + b"]" * 500,
        bytes(rng.randbytes(rng.randint(1, 300))),
        body.replace(b":", b"=", 1),
        body.replace(b'"', b"'"),
        b'{"prompt": "\xc3\x28\xff"}',
        b'{"prompt": "\xed\xa0\x80", "max_tokens": 1}',
        b'{"prompt": "a", "prompt": 1}',
        b"{" + b'"a":1,' * 30_000 + b'"b":1}',
    )
    return Case("not JSON", path, rng.choice(bodies), refused=True)


def deep(rng: random.Random) -> Case:
    """Nesting, where a field takes anything."""
    levels = rng.choice((10, 100, 900, 5000))
    inner = b'{"a":' * levels + b"1" + b"}" * levels
    name = rng.choice((b"chat_template_kwargs", b"metadata", b"tools", b"documents", b"response_format", b"logit_bias"))
    body = _encode(VALID["/v1/chat/completions"])[:-1] + b', "' + name + b'": ' + inner + b"}"
    return Case("deep nesting", "/v1/chat/completions", body)


def content_type(rng: random.Random) -> Case:
    """Bodies under another name, or none."""
    path = rng.choice(list(VALID))
    kind = rng.choice(
        (
            "text/plain",
            "multipart/form-data; boundary=x",
            "application/x-www-form-urlencoded",
            "application/xml",
            "",
            "/",
            "a" * 3000,
            "application/json; charset=utf-16",
            "application/json; charset=nonsense",
            "image/png",
            "multipart/form-data",
        )
    )
    body = rng.choice(
        (_encode(VALID[path]), b"a=b&c=d", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n')
    )
    return Case("content type", path, body, headers=(("Content-Type", kind),))


def method(rng: random.Random) -> Case:
    """The wrong method, or a path that isn't there."""
    verb = rng.choice(("GET", "PUT", "DELETE", "PATCH", "BREW", "TRACE", "post", "X" * 200))
    path = rng.choice(
        (
            *VALID,
            "/v1",
            "/v1/completions/",
            "//v1//completions",
            "/%00",
            "/%ff%fe",
            "/..%2f..%2fetc/passwd",
            "/v1/models/none",
            "/v1/models/" + "%2e" * 200,
            "/" + "a" * 5000,
            "/health?" + "a=b&" * 2000,
        )
    )
    if verb == "GET" and path.startswith("/health"):
        verb = "PUT"
    return Case("method or path", path, b"", method=verb, headers=(), refused=True)


def headers(rng: random.Random) -> Case:
    """Headers that lie, repeat, overflow or aren't headers."""
    body = _encode(VALID["/v1/completions"])
    start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw = rng.choice(
        (
            start + b"Content-Length: -1\r\n\r\n" + body,
            start + b"Content-Length: abc\r\n\r\n" + body,
            start + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n" + body,
            start + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
            start + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
            start + b"Transfer-Encoding: gzip\r\n\r\n",
            start + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
            start + b"".join(b"X%d: y\r\n" % i for i in range(5000)) + b"\r\n",
            b"POST /v1/completions HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET\r\n\r\n",
            b"\r\n\r\n\r\n",
            b"POST  /v1/completions\r\n\r\n",
            bytes(rng.randbytes(200)),
            start + b"Bad Header: x\r\n\r\n",
            start + b"\xff\xfe: x\r\n\r\n",
            start + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
            start + b"Expect: 200-maybe\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
            start + b"Authorization: Bearer \xff\xfe\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
            start + b"X-Request-Id: " + b"i" * 4000 + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        )
    )
    return Case("headers", "/v1/completions", body, raw=raw)


def truncated(rng: random.Random) -> Case:
    """A body that ends before its Content-Length; the connection is closed from this side."""
    path = rng.choice(list(VALID))
    body = _encode(VALID[path])
    return Case("truncated", path, body, send_only=rng.randrange(len(body)))


def hang_up(rng: random.Random) -> Case:
    """A good request whose client goes away: before the answer, in its headers, or in the middle of a stream."""
    path = rng.choice(("/v1/completions", "/v1/chat/completions"))
    body = VALID[path] | {
        "max_tokens": rng.choice((1, 50, 200)),
        "stream": rng.random() < 0.8,
        "n": rng.choice((1, 1, 3)),
    }
    return Case("hang-up", path, _encode(body), hang_up_after=rng.choice((0, 1, 100, 400, 2000)))


KINDS: dict[Callable[[random.Random], Case], int] = {  # and their weights
    mutated: 24,
    strange_field: 20,
    unknown_field: 4,
    absurd: 14,
    absurd_messages: 6,
    not_json: 10,
    deep: 3,
    content_type: 5,
    method: 5,
    headers: 5,
    truncated: 2,
    hang_up: 2,
}


def random_case(rng: random.Random) -> Case:
    return rng.choices(list(KINDS), weights=list(KINDS.values()))[0](rng)


def _streaming(rng: random.Random, path: str) -> dict[str, Any]:
    """A third of the answers comes as a stream."""
    return {"stream": True} if path.startswith("/v1/") and rng.random() < 0.33 else {}


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    found: list[tuple[Any, Any]] = [(value, key) for key, _ in pairs]
    for _, inner in pairs:
        found += _places(inner)
    return found or [({"x": 1}, "x")]


def _encode(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=True).encode()
