"""Tokens per second with speculation and without, pair by pair, where answers copy and where they can't.

    python benchmarks/speculation.py MODEL [--streams 1,8,32] [--tokens 256] [--rounds 5] [--config '{"method": ...}']

One process has the model; two engines take turns on it, each with an empty prefix cache. A round has two sets of
requests, of which each engine is the first to run one: what runs first is slower, and a drafter may remember what it
has seen. A ratio is that of one round; the table has the median of them, the lowest and the highest. Tasks:

    rewrite     "rewrite this code", of functions of Python's standard library
    extract     JSON out of records in a text
    docstrings  each function of a module with its docstring
    random      random tokens as prompts, sampled at temperature 1 and past the end token: nothing to copy

The first three are greedy and end where the model ends them. `right` is the share of checked drafts that were.
"""

from __future__ import annotations

import argparse
import ast
import calendar
import configparser
import csv
import difflib
import fractions
import heapq
import inspect
import json
import random
import shlex
import statistics
import string
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import torch

from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.speculation.config import parse_speculative
from octavo.runtime.startup import load_engine
from octavo.runtime.worker.replays import StepReplays
from octavo.runtime.worker.worker import Worker
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

MODULES = (calendar, configparser, csv, difflib, fractions, heapq, json.decoder, shlex, statistics, string, textwrap)
CITIES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Accra", "Perth", "Turin", "Izmir")
NAMES = ("Ada", "Ben", "Chloe", "Dev", "Emil", "Fay", "Gus", "Hana", "Ines", "Jon")


def main() -> None:
    arguments = parse_arguments()
    config = EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        device="cpu",
        num_threads=arguments.threads,
        speculative_config=parse_speculative(arguments.config),
    )
    engine, _ = load_engine(config, time.time())
    plain = without(engine)
    tasks = {name: task for name, task in TASKS.items() if name in arguments.tasks.split(",")}
    text = ModelText(Path(arguments.model))
    print("| task | streams | plain tok/s | speculating tok/s | ratio (lowest to highest) | right |")
    print("|---|---|---|---|---|---|")
    for name, task in tasks.items():
        for streams in map(int, arguments.streams.split(",")):
            print(row(name, streams, pairs(engine, plain, task, text, streams, arguments)), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=256, help="most of an answer (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs (default 5)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of the tasks")
    parser.add_argument("--config", default='{"method": "ngram"}', help="of --speculative-config")
    return parser.parse_args()


def without(engine: Engine) -> Engine:
    """An engine that doesn't speculate, over the same model and the same memory for its cache."""
    worker = engine.worker
    limits = engine.scheduler.config
    sizes = (limits.max_model_len, limits.block_size)
    replays = None if worker.replays is None else StepReplays(worker.model, worker.caches, *sizes)
    return Engine(Worker(worker.model, worker.caches, limits, replays=replays), limits, overlaps=False)


class ModelText:
    """Prompts as the server makes them, and what ends an answer."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.open(directory)
        self._template = ChatTemplate.open(directory, self.tokenizer.special_tokens)
        file = directory / "generation_config.json"
        ends = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        ends = self.tokenizer.eos_id if ends is None else ends
        self.end_ids: tuple[int, ...] = tuple(ends) if isinstance(ends, list) else (ends,)
        self.vocab_size: int = json.loads((directory / "config.json").read_text())["vocab_size"]

    def prompt(self, text: str) -> list[int]:
        if not self._template.templates:
            return self.tokenizer.encode(text + "\n\n")
        chat = self._template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        return self.tokenizer.encode(chat, add_special_tokens=False)


Task = Callable[[ModelText, random.Random, int], AddRequest]
Pair = tuple[float, float, float]  # tokens/s without, with, and the share of drafts that were right


def pairs(
    engine: Engine, plain: Engine, task: Task, text: ModelText, streams: int, arguments: argparse.Namespace
) -> list[Pair]:
    """One a round."""
    found: list[Pair] = []
    for number in range(-1, arguments.rounds):  # the first one is not counted
        rng = random.Random(1000 * streams + number)
        one, other = ([task(text, rng, arguments.tokens) for _ in range(streams)] for _ in range(2))
        rates: dict[Engine, list[tuple[float, float]]] = {plain: [], engine: []}
        for it, work in ((plain, one), (engine, one), (engine, other), (plain, other)):
            rates[it].append(rate(it, [named(asked, i) for i, asked in enumerate(work)]))
        if number >= 0:
            base, speculating = (statistics.harmonic_mean(speed for speed, _ in rates[it]) for it in (plain, engine))
            found.append((base, speculating, statistics.mean(right for _, right in rates[engine])))
    return found


def named(request: AddRequest, number: int) -> AddRequest:
    return AddRequest(f"{number}", request.token_ids, request.params, 0.0)


def rate(engine: Engine, work: list[AddRequest]) -> tuple[float, float]:
    """(tokens/s from when all answers have begun, the share of checked drafts that were right)."""
    engine.scheduler.reset_prefix_cache()
    before = engine.scheduler.stats()
    for request in work:
        refused = engine.add(request)
        assert not refused, refused[0].error
    begun: set[str] = set()
    num_tokens = 0
    begin = 0.0
    while engine.has_work:
        outputs = engine.step()
        if begin:
            num_tokens += sum(len(output.token_ids) for output in outputs)
        begun.update(output.request_id for output in outputs)
        if not begin and len(begun) == len(work):
            begin = time.perf_counter()
    seconds = time.perf_counter() - begin
    after = engine.scheduler.stats()
    drafts = after.num_draft_tokens - before.num_draft_tokens
    right = sum(after.accepted_per_pos) - sum(before.accepted_per_pos)
    return num_tokens / seconds, right / max(1, drafts)


def row(name: str, streams: int, found: list[Pair]) -> str:
    ratios = sorted(speculating / base for base, speculating, _ in found)
    base, speculating, right = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"| {name} | {streams} | {base:.0f} | {speculating:.0f} | {ratio} | {100 * right:.0f}% |"


def functions() -> list[tuple[str, str, str]]:
    """(name, source, docstring) of functions that are neither short nor long."""
    found: list[tuple[str, str, str]] = []
    for module in MODULES:
        source = inspect.getsource(module)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                segment = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
                if 400 < len(segment) < 1500:
                    found.append((node.name, segment, ast.get_docstring(node) or ""))
    return found


FUNCTIONS = functions()


def asked(text: ModelText, prompt: str, num_tokens: int) -> AddRequest:
    ends = text.end_ids
    return AddRequest("", text.prompt(prompt), SamplingParams(num_tokens, temperature=0.0, stop_token_ids=ends), 0.0)


def rewrite(text: ModelText, rng: random.Random, num_tokens: int) -> AddRequest:
    name, source, _ = rng.choice(FUNCTIONS)
    wish = f"Rewrite this code: rename the function {name} to {name}_two and change nothing else."
    return asked(text, f"{wish}\n\n```python\n{source}\n```", num_tokens)


def extract(text: ModelText, rng: random.Random, num_tokens: int) -> AddRequest:
    records = [
        f"Order {rng.randrange(10_000)}: {rng.choice(NAMES)} from {rng.choice(CITIES)} bought {rng.randrange(2, 90)} "
        f"items of article {rng.randrange(10**6)} for {rng.randrange(10**4) / 100} dollars."
        for _ in range(8)
    ]
    prompt = 'Extract each order as JSON with the keys "order", "name", "city", "items", "article", "dollars".\n\n'
    return asked(text, prompt + "\n".join(records), num_tokens)


def docstrings(text: ModelText, rng: random.Random, num_tokens: int) -> AddRequest:
    some = rng.sample([it for it in FUNCTIONS if it[2]], 2)
    source = "\n\n".join(source for _, source, _ in some)
    prompt = f"Copy the docstring of each function, with the function's name.\n\n```python\n{source}\n```"
    return asked(text, prompt, num_tokens)


def noise(text: ModelText, rng: random.Random, num_tokens: int) -> AddRequest:
    prompt = [rng.randrange(text.vocab_size) for _ in range(128)]
    return AddRequest("", prompt, SamplingParams(num_tokens, temperature=1.0, seed=rng.randrange(2**31)), 0.0)


TASKS: dict[str, Task] = {"rewrite": rewrite, "extract": extract, "docstrings": docstrings, "random": noise}


if __name__ == "__main__":
    with torch.inference_mode():
        main()
