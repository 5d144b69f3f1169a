"""The load of cpu_vs_peers.py: one measurement against one OpenAI-compatible server, printed as one line of JSON.

    python benchmarks/load_client.py http://127.0.0.1:8000 MODEL decode --streams 8
    python benchmarks/load_client.py http://127.0.0.1:8000 MODEL prefill

It speaks HTTP over plain asyncio streams and parses no JSON while the clock runs: on a machine of two cores the
client's own time is taken from the server, and a client of the usual kind (httpx, 0.1 ms an event) would take the
more from a server the faster it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# Words that a byte-pair vocabulary of English holds whole, so that a number of words is about a number of tokens.
VOCABULARY = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
)
WORDS = VOCABULARY.split()


@dataclass(frozen=True)
class Answer:
    """One request's clock: seconds since the measurement began, and what the server says that it counted."""

    begun: float
    first: float
    ended: float
    num_events: int
    usage: dict[str, int]


async def post(url: str, body: dict[str, Any]) -> Answer:
    """POST to /v1/completions and read to the end; a stream's events are counted, and its last usage is kept."""
    parts = urlsplit(url)
    payload = json.dumps(body).encode()
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = (
        f"POST {parts.path}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    status = int((await reader.readline()).split()[1])
    head_lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    first, pieces = 0.0, []
    if b"transfer-encoding: chunked" in head_lines:
        while size := int(await reader.readline(), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
            first = first or time.perf_counter()
    else:
        pieces.append(await reader.read())
        first = time.perf_counter()
    ended = time.perf_counter()
    writer.close()
    text = b"".join(pieces).decode()
    if status != 200:
        raise SystemExit(f"{url} answered {status}: {text[:500]}")
    return Answer(begun, first, ended, *count(text, stream=body["stream"]))


def count(text: str, *, stream: bool) -> tuple[int, dict[str, int]]:
    """Events that carry a choice, and the usage. llama.cpp's server sends no usage in a stream."""
    if not stream:
        return 1, json.loads(text)["usage"]
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    for event in events:
        if "error" in event:
            raise SystemExit(f"the stream ended in an error: {event['error']}")
    usages = [event["usage"] for event in events if event.get("usage")]
    return sum(1 for event in events if event.get("choices")), usages[-1] if usages else {}


def request(args: argparse.Namespace, prompt: str, max_tokens: int, *, stream: bool, number: int = 0) -> dict[str, Any]:
    """The number-th request's body."""
    names = args.model.split(",")
    body = {
        "model": names[number % len(names)],
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }
    extra: dict[str, Any] = json.loads(args.extra)
    return body | extra | ({"stream_options": {"include_usage": True}} if stream else {})


def text(rng: random.Random, words: int) -> str:
    """So many words, and a number before them that makes the text another one each time."""
    return f"{rng.randrange(10**6)} " + " ".join(rng.choice(WORDS) for _ in range(words))


async def decode(args: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """`streams` answers at once, each to a short prompt of its own: tokens of all of them over the wall's seconds.

    With `shared`, all prompts begin with one text of so many words, which no request has had before.
    """
    prompts = [f"{i}. Write a long story about a {rng.choice(WORDS)} and a {rng.choice(WORDS)}.\n\nOnce upon a time"
               for i in rng.sample(range(1000), args.streams)]  # fmt: skip
    if args.shared:
        common = text(rng, args.shared)
        prompts = [f"{common}\n{prompt}" for prompt in prompts]
    bodies = [request(args, prompt, args.tokens, stream=True, number=i) for i, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*(post(args.url, body) for body in bodies))
    wall = max(a.ended for a in answers) - min(a.begun for a in answers)
    tokens = [a.usage.get("completion_tokens", a.num_events) for a in answers]
    gaps = [(a.ended - a.first) / max(n - 1, 1) for a, n in zip(answers, tokens, strict=True)]
    return {
        "tokens_per_s": sum(tokens) / wall,
        "tokens": sum(tokens),
        "wall_s": wall,
        "ttft_ms": statistics.median(a.first - a.begun for a in answers) * 1e3,
        "inter_token_ms": statistics.median(gaps) * 1e3,
    }


async def prefill(args: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """Prompts of `words` words, one after another, one token answered: prompt tokens over seconds."""
    tokens, wall = 0, 0.0
    for _ in range(args.prompts):
        answer = await post(args.url, request(args, text(rng, args.words), 1, stream=False))
        tokens += answer.usage["prompt_tokens"]
        wall += answer.ended - answer.begun
    return {"tokens_per_s": tokens / wall, "tokens": tokens, "wall_s": wall, "ttft_ms": wall / args.prompts * 1e3}


async def context(args: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """`streams` answers at once to prompts of `words` words each: tokens behind each one's first over those seconds.

    Each prompt is sent once before, so that the prefix cache has it and the answers begin together.
    """
    prompts = [text(rng, args.words) for _ in range(args.streams)]
    for prompt in prompts:
        await post(args.url, request(args, prompt, 1, stream=False))
    bodies = [request(args, prompt, args.tokens, stream=True) for prompt in prompts]
    answers = await asyncio.gather(*(post(args.url, body) for body in bodies))
    tokens = [a.usage.get("completion_tokens", a.num_events) for a in answers]
    wall = max(a.ended for a in answers) - min(a.first for a in answers)
    return {
        "tokens_per_s": sum(n - 1 for n in tokens) / wall,
        "tokens": sum(tokens),
        "wall_s": wall,
        "ttft_ms": statistics.median(a.first - a.begun for a in answers) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server, without /v1")
    parser.add_argument("model", help="the name that the server serves it under, or several: each request has the next")
    parser.add_argument("load", choices=["decode", "context", "prefill"])
    parser.add_argument("--streams", type=int, default=1, help="answers at once (default 1)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer (default 128)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts one after another, for prefill (default 4)")
    parser.add_argument("--words", type=int, default=1000, help="words of a prompt (default 1000)")
    parser.add_argument("--shared", type=int, default=0, help="words that all prompts of decode begin with (default 0)")
    parser.add_argument("--extra", default="{}", help='more fields of the request, as JSON: {"ignore_eos": true}')
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default 0); a new one for each repetition")
    args = parser.parse_args()
    load = {"decode": decode, "context": context, "prefill": prefill}[args.load]
    print(json.dumps(asyncio.run(load(args, random.Random(args.seed)))))


if __name__ == "__main__":
    main()
