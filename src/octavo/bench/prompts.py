"""Prompts: random texts of an exact number of tokens, measured by the server's own /tokenize.

A text is "The" and words drawn from a list. The server says beforehand how many tokens each word adds, so the client
needs no tokenizer; special tokens and the chat template are in the count of "The" alone. A server without /tokenize
gets as many words as tokens were asked for: in nearly every vocabulary each of these words is one token, and the report
shows what the server counted. A tokenizer on this machine (`local_vocabulary`) counts in place of such a server.

A prompt may be a conversation: its earlier turns are texts of the same kind, the model's among them, so that each
server gets the same tokens whatever it answers.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

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
    """A text, how many tokens it has where that is known, and how many tokens of answer to ask for.

    history  the texts before it in a conversation, the user's and the model's in turns; num_tokens includes them
    follows  it is the next turn of the prompt before it in the list, sent after that one's answer and `think` seconds
    arrival  seconds after the first prompt at which it came, in a trace that says so
    cut      it, or its answer, is shorter than was asked for, since the server's context is
    model    the model that it is asked of, where that is not the load's own: an adapter
    """

    text: str
    num_tokens: int | None
    output_len: int
    history: tuple[str, ...] = ()
    follows: bool = False
    think: float = 0.0
    arrival: float | None = None
    cut: bool = False
    model: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that FIRST alone takes, and the words with what each adds; `exact` if a tokenizer measured them.

    turn: the tokens that two more messages add to a conversation, of the model and of the user, both FIRST alone.
    counter: who counted, for the report.
    """

    base: int
    words: Sequence[tuple[str, int]]
    exact: bool
    max_model_len: int | None
    turn: int = 2
    counter: str = "the server's /tokenize"

    @property
    def largest(self) -> int:
        """The most tokens that a word adds."""
        return max((cost for _, cost in self.words), default=0)

    def fitting(self, tokens: int, answer: int) -> tuple[int, int, bool]:
        """Lengths of prompt and answer that fit the context, and whether they are shorter than was asked for.

        Raises PromptError for a context without room for both.
        """
        tokens = max(tokens, self.base)
        limit = self.max_model_len
        if limit is None or tokens + answer <= limit:
            return tokens, answer, False
        if limit <= self.base:
            raise PromptError(f"this server's context of {limit} tokens has no room for a prompt and its answer")
        answer = min(answer, max(1, limit // 4), limit - self.base)
        return min(tokens, limit - answer), answer, True


# How many tokens a conversation has: its texts are the user's and the model's in turns
Count = Callable[[Sequence[str]], Awaitable[int]]


class _Counted(msgspec.Struct):
    """What vLLM's /tokenize answers, as far as it is used."""

    count: Annotated[int, msgspec.Meta(ge=0)]
    max_model_len: int | None = None


class ServerCount:
    """Counts by the server's /tokenize. Raises HttpError where it has none."""

    def __init__(self, client: Client, model: str, *, chat: bool) -> None:
        self.max_model_len: int | None = None  # which the server has said, after the first count
        self._client = client
        self._model = model
        self._chat = chat

    async def __call__(self, texts: Sequence[str]) -> int:
        """The tokens of a conversation through the chat template, or of a prompt."""
        body: dict[str, Any] = {"model": self._model}
        body |= {"messages": messages(texts)} if self._chat else {"prompt": " ".join(texts)}
        answer = await self._client.json("POST", "/tokenize", body)
        try:
            found = msgspec.convert(answer, _Counted)
        except msgspec.ValidationError as e:
            raise HttpError(f"POST /tokenize: the answer has no count: {e}") from e
        self.max_model_len = found.max_model_len
        return found.count


class LocalCount:
    """Counts by a checkpoint's own tokenizer and chat template, on this machine."""

    def __init__(self, directory: Path, *, chat: bool) -> None:
        from octavo.text.chat_template import ChatTemplate, ChatTemplateError
        from octavo.text.tokenizer import Tokenizer, TokenizerError

        try:
            self._tokenizer = Tokenizer.open(directory)
            self._template = ChatTemplate.open(directory, self._tokenizer.special_tokens) if chat else None
        except (TokenizerError, ChatTemplateError) as e:
            raise PromptError(f"--tokenizer: {e}") from e

    async def __call__(self, texts: Sequence[str]) -> int:
        """The tokens of a conversation through the chat template, or of a prompt."""
        if self._template is None:
            return len(self._tokenizer.encode(" ".join(texts)))
        return len(self._tokenizer.encode(self._template.render(messages(texts)), add_special_tokens=False))


async def measure_vocabulary(client: Client, model: str, *, chat: bool, turns: bool = False) -> Vocabulary:
    """Ask the server's /tokenize, in one call where every word is a single token, else in one for each word.

    `turns`: measure what further turns of a conversation add, too.
    """
    count = ServerCount(client, model, chat=chat)
    try:
        await count([FIRST])
    except HttpError:
        return Vocabulary(1, [(word, 1) for word in WORDS], exact=False, max_model_len=None)
    return replace(await _measured(count, turns), max_model_len=count.max_model_len)


async def local_vocabulary(directory: Path, *, chat: bool) -> Vocabulary:
    """The same by a tokenizer on this machine."""
    found = await _measured(LocalCount(directory, chat=chat), turns=True)
    return replace(found, counter=f"the tokenizer of {directory}")


async def _measured(count: Count, turns: bool) -> Vocabulary:
    base = await count([FIRST])
    turn = await count([FIRST] * 3) - base if turns else 2
    whole = await count([" ".join((FIRST, *WORDS))])
    if whole - base == len(WORDS):
        return Vocabulary(base, [(word, 1) for word in WORDS], exact=True, max_model_len=None, turn=turn)
    gate = asyncio.Semaphore(MAX_AT_ONCE)

    async def added(word: str) -> int:
        async with gate:
            return await count([f"{FIRST} {word}"]) - base

    costs = await asyncio.gather(*(added(word) for word in WORDS))
    words = [(word, cost) for word, cost in zip(WORDS, costs, strict=True) if cost > 0]
    return Vocabulary(base, words, exact=True, max_model_len=None, turn=turn)


def messages(texts: Sequence[str]) -> list[dict[str, str]]:
    """A conversation as chat messages: the user's and the model's in turns."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


@dataclass(frozen=True)
class RandomShape:
    """The lengths of random prompts: uniform in [len * (1 - ratio), len * (1 + ratio)], rounded outwards.

    prefix_len  tokens that come first in the prompt, before its random ones; prompts that share one begin alike
    prefixes    how many different ones there are, which prompts take in turns
    """

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    prefixes: int = 1


def random_prompts(vocabulary: Vocabulary, count: int, shape: RandomShape, rng: random.Random) -> list[Prompt]:
    """Prompts of random words in an order that the words alone give; their lengths include the prefix."""
    low_in, high_in = (shape.prefix_len + length for length in _bounds(shape.input_len, shape.range_ratio))
    low_out, high_out = _bounds(shape.output_len, shape.range_ratio)
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
    filler = Filler(vocabulary, rng)
    prefixes = [filler.words(shape.prefix_len - vocabulary.base) for _ in range(shape.prefixes)]
    prompts = []
    for i in range(count):
        begun, used = prefixes[i % len(prefixes)]
        wanted = rng.randint(low_in, high_in) - vocabulary.base - used
        words, taken = filler.words(wanted)
        num_tokens = vocabulary.base + used + taken
        text = " ".join((FIRST, *begun, *words))
        prompts.append(Prompt(text, num_tokens if vocabulary.exact else None, rng.randint(low_out, high_out)))
    return prompts


def _bounds(length: int, ratio: float) -> tuple[int, int]:
    return max(1, math.floor(length * (1 - ratio))), max(1, math.ceil(length * (1 + ratio)))


class Filler:
    """Random words that take a given number of tokens."""

    def __init__(self, vocabulary: Vocabulary, rng: random.Random) -> None:
        self._rng = rng
        self._costs = dict(vocabulary.words)
        self._largest = vocabulary.largest
        self._fitting = [[(w, c) for w, c in vocabulary.words if c <= room] for room in range(self._largest + 1)]
        self._singles = [word for word, _ in vocabulary.words] if self._largest == 1 else []

    def drawing_from(self, rng: random.Random) -> Filler:
        """The same with other random numbers."""
        other = copy(self)
        other._rng = rng
        return other

    def words(self, num_tokens: int) -> tuple[list[str], int]:
        """Words that take as many tokens, and how many they really take: less where no word fits the rest."""
        if self._singles and num_tokens > 0:
            return self._rng.choices(self._singles, k=num_tokens), num_tokens
        words = []
        room = max(num_tokens, 0)
        taken = 0
        while room > taken and (choices := self._fitting[min(room - taken, self._largest)]):
            word, cost = self._rng.choice(choices)
            words.append(word)
            taken += cost
        return words, taken

    def beginning(self, words: Iterable[str], num_tokens: int) -> tuple[list[str], int]:
        """The words at the beginning of these that take at most as many tokens, and how many they take."""
        kept: list[str] = []
        used = 0
        for word in words:
            cost = self._costs[word]
            if used + cost > num_tokens:
                break
            kept.append(word)
            used += cost
        return kept, used
