"""LLM.generate beside the HTTP path: the same prompts to the same engine, with a server and without.

    PYTHONPATH=src python -m benchmarks.offline MODEL [--prompts 1000] [--concurrency 512] [--rounds 5]

Both engines are loaded at once, and asked in turns, so that one waits while the other computes; the order changes from
round to round. Prompts are new in each round and the same for both, answers have all their tokens, and no prefix is
cached. A request is one prompt; the client speaks HTTP over plain asyncio streams (load_client.py) and its process is
the one that has the LLM. What is compared is the time until the last answer, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu_servers import NAME, octavo_server, running
from benchmarks.intervals import interval
from benchmarks.load_client import WORDS, post

from octavo import LLM, SamplingParams


def prompts_of(count: int, words: int, seed: int) -> list[str]:
    """Texts that differ from the first word on."""
    rng = random.Random(seed)
    return [f"{number} " + " ".join(rng.choices(WORDS, k=words)) for number in rng.sample(range(10**6), count)]


def offline_seconds(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> float:
    """Until the last answer of one call."""
    begun = time.perf_counter()
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    seconds = time.perf_counter() - begun
    check(sum(len(output.outputs[0].token_ids) for output in outputs), len(prompts), params)
    return seconds


def http_seconds(url: str, prompts: Sequence[str], params: SamplingParams, concurrency: int) -> float:
    """Until the last answer of as many requests as there are prompts, so many of them open at a time."""

    async def ask() -> tuple[float, int]:
        free = asyncio.Semaphore(concurrency)

        async def one(prompt: str) -> int:
            body = {"model": NAME, "prompt": prompt, "max_tokens": params.max_tokens, "temperature": 0}
            async with free:
                answer = await post(url, body | {"ignore_eos": True, "stream": False})
            return answer.usage["completion_tokens"]

        begun = time.perf_counter()
        counts = await asyncio.gather(*map(one, prompts))
        return time.perf_counter() - begun, sum(counts)

    seconds, tokens = asyncio.run(ask())
    check(tokens, len(prompts), params)
    return seconds


def check(tokens: int, num_prompts: int, params: SamplingParams) -> None:
    """Both have made as many tokens as were asked for."""
    if tokens != num_prompts * (params.max_tokens or 0):
        raise SystemExit(f"{tokens} tokens for {num_prompts} prompts of {params.max_tokens}")


def table(pairs: Sequence[tuple[float, float]], num_prompts: int, num_tokens: int) -> str:
    """A line for each round, (seconds offline, seconds over HTTP), and the ratio of their speeds with its interval."""
    lines = ["| round | LLM.generate: tokens/s | HTTP: tokens/s | ratio |", "|---|---|---|---|"]
    total = num_prompts * num_tokens
    for number, (offline, http) in enumerate(pairs, start=1):
        lines.append(f"| {number} | {total / offline:,.0f} | {total / http:,.0f} | {http / offline:.3f} |")
    ratios = [http / offline for offline, http in pairs]
    low, high = interval(ratios, statistics.median)
    lines.append(f"| median | | | {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--words", type=int, default=64, help="of a prompt, each about a token (default 64)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument("--concurrency", type=int, default=512, help="open requests over HTTP (default 512)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    pairs: list[tuple[float, float]] = []
    options = {"max_model_len": 2048, "kv_cache_memory_bytes": 1 << 30, "enable_prefix_caching": False}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(octavo_server("octavo", args.model, "--no-enable-prefix-caching"), Path(folder, "log")) as server,
        LLM(str(args.model), **options) as llm,
    ):
        for number in range(-1, args.rounds):  # the first one is for what is made on first use
            prompts = prompts_of(args.prompts if number >= 0 else 32, args.words, number + 1)
            seconds = {}
            for way in ("offline", "http") if number % 2 else ("http", "offline"):
                if way == "offline":
                    seconds[way] = offline_seconds(llm, prompts, params)
                else:
                    seconds[way] = http_seconds(server.url, prompts, params, args.concurrency)
            if number >= 0:
                pairs.append((seconds["offline"], seconds["http"]))
                print(f"round {number + 1}: {seconds}", file=sys.stderr, flush=True)
    print(table(pairs, args.prompts, args.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
