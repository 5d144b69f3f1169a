"""Prompts: random texts of an exact number of tokens, measured by the server's own /tokenize, or lines of a file.

A text is "The" and words drawn from a list. The server says beforehand how many tokens each word adds, so the client
needs no tokenizer; special tokens and the chat template are in the count of "The" alone. A server without /tokenize
gets as many words as tokens were asked for: in nearly every vocabulary each of these words is one token, and the report
shows what the server counted.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.bench.http import Client, HttpError

FIRST = "The"
MAX_AT_ONCE = 16
COMMON = (
    "a about above after again air all also always an and animal another answer any around as ask at away back "
    "because before began being below between big book both boy but by call came can car carry case change children "
    "city close come could country cut day did different do does down each earth eat end enough even every example "
    "eye face family far father feet few find first follow food for form found four from get girl give go good great "
    "group grow had hand hard has have he head hear help her here high him his home house how idea if important in "
    "into is it its just keep kind know land large last later learn leave left let letter life light like line list "
    "little live long look made make man many may me men might mile more most mother mountain move much must my name "
    "near need never new next night no not now number of off often oil old on once one only open or other our out "
    "over own page paper part people place plant play point put question quick read real right river run said same "
    "saw say school sea second see seem sentence set she should show side small so some something sometimes song soon "
    "sound spell start state still stop story study such take talk tell than that the their them then there these "
    "they thing think this those thought three through time to together too took tree try turn two under until up us "
    "use very walk want was watch water way we well went were what when where which while white who why will with "
    "without word work world would write year you young your"
)
WORDS = COMMON.split()


class PromptError(ValueError):
    """The prompts that were asked for can't be made; the message is one line."""


@dataclass(frozen=True)
class Prompt:
    """A text, how many tokens it has where that is known, and how many tokens of answer to ask for."""

    text: str
    num_tokens: int | None
    output_len: int


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that FIRST alone takes, and the words with what each adds; `exact` if a server measured them."""

    base: int
    words: Sequence[tuple[str, int]]
    exact: bool
    max_model_len: int | None


async def measure_vocabulary(client: Client, model: str, *, chat: bool) -> Vocabulary:
    """Ask the server's /tokenize, in one call where every word is a single token, else in one for each word."""

    async def count(text: str) -> tuple[int, int | None]:
        body: dict[str, Any] = {"model": model}
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        answer = await client.json("POST", "/tokenize", body)
        try:
            return int(answer["count"]), answer.get("max_model_len")
        except (TypeError, KeyError, ValueError) as e:
            raise HttpError("POST /tokenize: the answer has no count") from e

    try:
        base, limit = await count(FIRST)
    except HttpError:
        return Vocabulary(1, [(word, 1) for word in WORDS], exact=False, max_model_len=None)
    whole, _ = await count(" ".join((FIRST, *WORDS)))
    if whole - base == len(WORDS):
        return Vocabulary(base, [(word, 1) for word in WORDS], exact=True, max_model_len=limit)
    gate = asyncio.Semaphore(MAX_AT_ONCE)

    async def added(word: str) -> int:
        async with gate:
            return (await count(f"{FIRST} {word}"))[0] - base

    costs = await asyncio.gather(*(added(word) for word in WORDS))
    words = [(word, cost) for word, cost in zip(WORDS, costs, strict=True) if cost > 0]
    return Vocabulary(base, words, exact=True, max_model_len=limit)


def random_prompts(
    vocabulary: Vocabulary, count: int, input_len: int, output_len: int, range_ratio: float, rng: random.Random
) -> list[Prompt]:
    """Prompts whose lengths are uniform in [len * (1 - ratio), len * (1 + ratio)], rounded outwards."""
    low_in, high_in = _bounds(input_len, range_ratio)
    low_out, high_out = _bounds(output_len, range_ratio)
    if low_in < vocabulary.base:
        raise PromptError(
            f"prompts of {low_in} tokens can't be made: the special tokens, the chat template and one word take "
            f"{vocabulary.base}; --random-input-len must be more"
        )
    limit = vocabulary.max_model_len
    if limit is not None and high_in + high_out > limit:
        raise PromptError(
            f"prompts of {high_in} tokens and answers of {high_out} don't fit into this server's context of {limit}: "
            "lower --random-input-len or --random-output-len"
        )
    fill = _filler(vocabulary, rng)
    prompts = []
    for _ in range(count):
        words, num_tokens = fill(rng.randint(low_in, high_in))
        text = " ".join((FIRST, *words))
        prompts.append(Prompt(text, num_tokens if vocabulary.exact else None, rng.randint(low_out, high_out)))
    return prompts


def _bounds(length: int, ratio: float) -> tuple[int, int]:
    return max(1, math.floor(length * (1 - ratio))), max(1, math.ceil(length * (1 + ratio)))


def _filler(vocabulary: Vocabulary, rng: random.Random) -> Callable[[int], tuple[list[str], int]]:
    """A function from a number of tokens to words that take so many, and the number that words and base really take."""
    largest = max((cost for _, cost in vocabulary.words), default=0)
    fitting = [[(w, c) for w, c in vocabulary.words if c <= room] for room in range(largest + 1)]

    def fill(num_tokens: int) -> tuple[list[str], int]:
        words = []
        room = num_tokens - vocabulary.base
        while room > 0 and (choices := fitting[min(room, largest)]):
            word, cost = rng.choice(choices)
            words.append(word)
            room -= cost
        return words, num_tokens - room

    return fill


def custom_prompts(path: Path, count: int, output_len: int, rng: random.Random) -> list[Prompt]:
    """The "prompt" of each line of a JSON-lines file, shuffled; repeated where there are fewer than `count`."""
    texts = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                texts.append(_prompt_of(line, f"{path}:{number}"))
    if not texts:
        raise PromptError(f"{path} has no prompts")
    rng.shuffle(texts)
    return [Prompt(texts[i % len(texts)], None, output_len) for i in range(count)]


def _prompt_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise PromptError(f"{place}: not JSON: {e}") from e
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise PromptError(f'{place}: not an object with a text under "prompt"')
    return str(row["prompt"])
