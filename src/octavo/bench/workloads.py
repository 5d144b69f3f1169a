"""Workloads with a name: what people ask of a model, as published traces and papers describe it.

    make_requests(workload, count, rng, vocabulary) -> list[Prompt]

`workload` is one of WORKLOADS or its name; `vocabulary` says what words cost (prompts.py: `measure_vocabulary` by the
server, `local_vocabulary` by a tokenizer), so that prompts have exactly the tokens that were drawn; `rng` alone decides
what is drawn. The prompts are random words: only their lengths, their shared beginnings and their order are like the
source's. A prompt that follows another in its conversation says so (`Prompt.follows`), and stands right behind it.

Prompts and answers that don't fit into the server's context are cut (`Prompt.cut`), and a conversation ends before the
turn that has no room for a new message: `cut_note` says how many. `Workload.scaled` shortens all lengths instead.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from octavo.bench.lengths import (
    AZURE_CHAT_ANSWERS,
    AZURE_CODE_ANSWERS,
    AZURE_CODE_PROMPTS,
    Lengths,
    LogNormal,
)
from octavo.bench.prompts import FIRST, Filler, Prompt, Vocabulary


@dataclass(frozen=True)
class Documents:
    """Texts that prompts begin with and share: `count` of them, of which a prompt has `each` different ones.

    skew: the i-th most popular is drawn in proportion to i ** -skew; 0: all are equally popular.
    """

    count: int
    each: int
    tokens: Lengths
    skew: float = 0.0


@dataclass(frozen=True)
class Workload:
    """What a kind of service is asked, and where that was published.

    first       tokens of a conversation's first message, without documents
    answer      tokens of each answer; servers are made to give that many (ignore_eos)
    turns       messages of the user in a conversation, on average; their number is geometric
    further     tokens of each further message
    think       mean seconds between an answer and the next message, exponential; an open load waits them
    documents   what comes before the first message
    burstiness  shape of the gamma distribution of gaps between conversations (arrivals.py), at any rate
    """

    name: str
    source: str
    first: Lengths
    answer: Lengths
    turns: float = 1.0
    further: Lengths | None = None
    think: float = 0.0
    documents: Documents | None = None
    burstiness: float = 1.0

    def scaled(self, factor: float) -> Workload:
        """The same workload with all lengths times `factor`."""
        if factor == 1:
            return self
        documents = self.documents and replace(self.documents, tokens=self.documents.tokens.scaled(factor))
        further = self.further and self.further.scaled(factor)
        first = self.first.scaled(factor)
        return replace(self, first=first, answer=self.answer.scaled(factor), further=further, documents=documents)

    def describe(self) -> str:
        """One line for a report: lengths on average, shape, and source."""
        parts = [f"{self.first.mean:,.0f} tokens"]
        if self.documents:
            each = (
                f"{self.documents.each} of {self.documents.count:,} texts" if self.documents.count > 1 else "one text"
            )
            parts = [
                f"{each} of {self.documents.tokens.mean:,.0f} tokens that prompts share, and {parts[0]} of their own"
            ]
        if self.further:
            more = self.turns - 1
            parts.append(f"then {more:g} more message{'' if more == 1 else 's'} of {self.further.mean:,.0f}")
        parts.append(f"answers of {self.answer.mean:,.0f}")
        return f"{', '.join(parts)} (all on average; {self.source})"


def _workloads(*workloads: Workload) -> dict[str, Workload]:
    return {workload.name: workload for workload in workloads}


WORKLOADS = _workloads(
    Workload(
        "chat",
        "turns and messages: LMSYS-Chat-1M, Zheng et al., ICLR 2024; answers: Azure's conversation trace of 2023",
        first=LogNormal(69.5, 1.0),
        answer=AZURE_CHAT_ANSWERS,
        turns=2.0,
        further=LogNormal(69.5, 1.0),
        think=8.0,
    ),
    Workload(
        "rag",
        "documents, their popularity and answers: Natural Questions over Wikipedia in RAGCache, Jin et al., 2024",
        first=LogNormal(16, 0.4),
        answer=LogNormal(6, 0.7),
        documents=Documents(count=1000, each=2, tokens=LogNormal(3718, 0.6), skew=1.07),
    ),
    Workload(
        "summarize",
        "LongBench as in DistServe, Zhong et al., OSDI 2024",
        first=LogNormal(1738.3, 0.3),
        answer=LogNormal(90.7, 0.5),
    ),
    Workload(
        "agent",
        "fitted to the means and the reuse of Mooncake's tool and agent trace, Qin et al., FAST 2025",
        first=LogNormal(4400, 0.6),
        answer=LogNormal(182, 0.8),
        turns=2.0,
        further=LogNormal(2414, 0.8),
        think=1.0,
        documents=Documents(count=1, each=1, tokens=LogNormal(1600)),
    ),
    Workload(
        "code",
        "Azure's code trace of 2023, Patel et al., ISCA 2024",
        first=AZURE_CODE_PROMPTS,
        answer=AZURE_CODE_ANSWERS,
        burstiness=0.06,
    ),
    Workload(
        "batch",
        "ShareGPT as in vLLM's paper, Kwon et al., SOSP 2023",
        first=LogNormal(161.31, 1.0),
        answer=LogNormal(337.99, 0.8),
    ),
)


def make_requests(workload: Workload | str, count: int, rng: random.Random, vocabulary: Vocabulary) -> list[Prompt]:
    """`count` prompts, the turns of a conversation behind each other. Raises PromptError where none fits the context.

    num_tokens is None in all of them where nothing could count tokens (`vocabulary.exact`).
    """
    if isinstance(workload, str):
        workload = WORKLOADS[workload]
    writer = _Writer(workload, rng, vocabulary)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        prompts += writer.conversation()
    return prompts[:count]


def cut_note(prompts: Sequence[Prompt], vocabulary: Vocabulary) -> str | None:
    """How many prompts are shorter than was drawn, or None."""
    cut = sum(prompt.cut for prompt in prompts)
    if not cut:
        return None
    return f"{cut} of {len(prompts)} prompts were cut to the context of {vocabulary.max_model_len} tokens"


class _Writer:
    """Conversations of one workload."""

    def __init__(self, workload: Workload, rng: random.Random, vocabulary: Vocabulary) -> None:
        self._workload = workload
        self._rng = rng
        self._vocabulary = vocabulary
        self._filler = Filler(vocabulary, rng)
        documents = workload.documents
        self._known: dict[int, tuple[list[str], int]] = {}
        self._weights = (
            list(accumulate((i + 1) ** -documents.skew for i in range(documents.count))) if documents else []
        )

    def conversation(self) -> list[Prompt]:
        """The prompts of one conversation: the first, and those that follow it."""
        workload = self._workload
        words, used = self._documents()
        own = workload.first.draw(self._rng)
        answer = workload.answer.draw(self._rng)
        # without documents, the message's length is the prompt's, the chat template included
        wanted = used + own - (0 if words else self._vocabulary.base)
        fits, answer, cut = self._vocabulary.fitting(self._vocabulary.base + wanted, answer)
        room = fits - self._vocabulary.base
        if room < used:
            words, used = self._filler.beginning(words, room)
        more, taken = self._filler.words(room - used)
        tokens = self._vocabulary.base + used + taken
        prompts = [self._prompt((" ".join((FIRST, *words, *more)),), tokens, answer, cut=cut)]
        while workload.further and self._rng.random() < 1 - 1 / workload.turns:
            turn = self._next(prompts[-1], tokens, workload.further.draw(self._rng))
            if turn is None:
                break
            prompt, tokens = turn
            prompts.append(prompt)
        return prompts

    def _next(self, before: Prompt, tokens: int, further: int) -> tuple[Prompt, int] | None:
        """The next turn, whose message has `further` tokens, and its tokens; None where the context has no room."""
        workload = self._workload
        wanted = max(before.output_len + further, self._vocabulary.turn)
        answer = workload.answer.draw(self._rng)
        fits, answer, cut = self._vocabulary.fitting(tokens + wanted, answer)
        if fits < tokens + max(before.output_len, self._vocabulary.turn):
            return None
        said, spoken = self._filler.words(min(before.output_len - 1, fits - tokens - self._vocabulary.turn))
        asked, taken = self._filler.words(fits - tokens - self._vocabulary.turn - spoken)
        total = tokens + self._vocabulary.turn + spoken + taken
        texts = (*before.history, before.text, " ".join((FIRST, *said)), " ".join((FIRST, *asked)))
        think = self._rng.expovariate(1 / workload.think) if workload.think else 0.0
        return self._prompt(texts, total, answer, follows=True, think=think, cut=cut), total

    def _prompt(
        self,
        texts: tuple[str, ...],
        tokens: int,
        answer: int,
        *,
        follows: bool = False,
        think: float = 0.0,
        cut: bool = False,
    ) -> Prompt:
        counted = tokens if self._vocabulary.exact else None
        return Prompt(texts[-1], counted, answer, history=texts[:-1], follows=follows, think=think, cut=cut)

    def _documents(self) -> tuple[list[str], int]:
        """The words that a prompt begins with, and their tokens."""
        documents = self._workload.documents
        if documents is None:
            return [], 0
        chosen: list[int] = []
        while len(chosen) < documents.each:
            (i,) = self._rng.choices(range(documents.count), cum_weights=self._weights)
            if i not in chosen:
                chosen.append(i)
        words: list[str] = []
        used = 0
        for i in chosen:
            if i not in self._known:
                self._known[i] = self._filler.words(documents.tokens.draw(self._rng))
            words += self._known[i][0]
            used += self._known[i][1]
        return words, used
