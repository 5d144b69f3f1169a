"""Workloads: prompts of the drawn lengths to the token, with the shape that their sources describe."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest

from octavo.bench.lengths import AZURE_CHAT_ANSWERS, AZURE_CODE_ANSWERS, AZURE_CODE_PROMPTS, LogNormal, Table
from octavo.bench.prompts import WORDS, PromptError, Vocabulary
from octavo.bench.workloads import WORKLOADS, cut_note, make_requests

# As a tokenizer counts that takes three tokens for a word with an o, 4 for a template, and 2 before a further message.
COSTS = {word: 3 if "o" in word else 1 for word in WORDS}
COSTLY = Vocabulary(5, list(COSTS.items()), exact=True, max_model_len=None, turn=6)
PLAIN = Vocabulary(1, [(word, 1) for word in WORDS], exact=True, max_model_len=None)


def counted(texts: tuple[str, ...]) -> int:
    """The tokens of a conversation, message by message."""
    words = [word for text in texts for word in text.split()[1:]]
    return 4 + len(texts) + 2 * (len(texts) - 1) + sum(COSTS[word] for word in words)


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_have_the_tokens_that_they_claim(name: str) -> None:
    prompts = make_requests(WORKLOADS[name].scaled(0.1), 60, random.Random(3), COSTLY)
    assert len(prompts) == 60
    for prompt in prompts:
        assert counted((*prompt.history, prompt.text)) == prompt.num_tokens
        assert prompt.output_len >= 1
    assert make_requests(WORKLOADS[name].scaled(0.1), 60, random.Random(3), COSTLY) == prompts
    assert make_requests(WORKLOADS[name].scaled(0.1), 60, random.Random(4), COSTLY) != prompts
    inexact = make_requests(name, 2, random.Random(3), Vocabulary(1, COSTLY.words, exact=False, max_model_len=None))
    assert [prompt.num_tokens for prompt in inexact] == [None, None]


def test_turns_repeat_what_was_said_and_are_as_long_as_the_answers_before() -> None:
    prompts = make_requests("chat", 400, random.Random(1), PLAIN)
    for before, after in pairwise(prompts):
        if after.follows:
            assert after.history[:-1] == (*before.history, before.text)
            assert before.num_tokens is not None
            assert after.num_tokens is not None
            assert after.num_tokens > before.num_tokens + before.output_len - 1
            assert len(after.history[-1].split()) == before.output_len
    follows = sum(prompt.follows for prompt in prompts)
    assert follows / len(prompts) == pytest.approx(0.5, abs=0.08)  # two turns on average: half of them follow; 3 sigma
    assert statistics.fmean(prompt.think for prompt in prompts if prompt.follows) == pytest.approx(8, rel=0.25)


@pytest.mark.parametrize(
    ("table", "mean"),
    [(AZURE_CHAT_ANSWERS, 211.13), (AZURE_CODE_PROMPTS, 2047.85), (AZURE_CODE_ANSWERS, 27.88)],
)
def test_tables_have_the_means_of_their_traces(table: Table, mean: float) -> None:
    """The means are of all requests of the traces, not of these percentiles."""
    assert table.mean == pytest.approx(mean, rel=0.05)
    assert list(table.lengths) == sorted(table.lengths)
    rng = random.Random(2)
    drawn = [table.draw(rng) for _ in range(20_000)]
    error = statistics.stdev(drawn) / 20_000**0.5
    assert statistics.fmean(drawn) == pytest.approx(table.mean, abs=5 * error)
    assert statistics.median(drawn) == pytest.approx(table.lengths[11], rel=0.1)


def test_log_normal_lengths_have_their_mean() -> None:
    rng = random.Random(2)
    for mean, sigma in ((69.5, 1.0), (3718, 0.6)):
        drawn = [LogNormal(mean, sigma).draw(rng) for _ in range(20_000)]
        assert statistics.fmean(drawn) == pytest.approx(mean, abs=5 * statistics.stdev(drawn) / 20_000**0.5)
    assert {LogNormal(1600).draw(rng) for _ in range(5)} == {1600}


def test_three_percent_of_the_documents_are_in_sixty_percent_of_the_places() -> None:
    """As RAGCache found of Wikipedia; the first words of a prompt are those of its first document."""
    prompts = make_requests(WORKLOADS["rag"].scaled(0.003), 4000, random.Random(1), PLAIN)
    firsts = [" ".join(prompt.text.split()[:6]) for prompt in prompts]
    counts = sorted((firsts.count(first) for first in set(firsts)), reverse=True)
    assert sum(counts[:30]) / 4000 == pytest.approx(0.6, abs=0.04)


def test_agents_find_as_much_cached_as_in_mooncakes_trace() -> None:
    """59 % of the tokens of its tool and agent trace stood in an earlier request's prompt, from its beginning on."""
    prompts = make_requests(WORKLOADS["agent"].scaled(0.02), 1500, random.Random(1), PLAIN)
    lengths = [prompt.num_tokens or 0 for prompt in prompts]
    assert statistics.fmean(lengths) == pytest.approx(0.02 * 8596, rel=0.1)
    seen: set[int] = set()
    reused = 0
    for prompt in prompts:
        state = 0
        for word in " ".join((*prompt.history, prompt.text)).split():
            state = hash((state, word))
            reused += state in seen
            seen.add(state)
    assert reused / sum(lengths) == pytest.approx(0.59, abs=0.04)


def test_what_does_not_fit_is_cut_and_said() -> None:
    for name in WORKLOADS:
        vocabulary = Vocabulary(5, COSTLY.words, exact=True, max_model_len=300, turn=6)
        prompts = make_requests(name, 60, random.Random(3), vocabulary)
        for prompt in prompts:
            assert prompt.num_tokens is not None
            assert prompt.num_tokens + prompt.output_len <= 300
            assert counted((*prompt.history, prompt.text)) == prompt.num_tokens
        cut = sum(prompt.cut for prompt in prompts)
        assert cut
        assert cut_note(prompts, vocabulary) == f"{cut} of 60 prompts were cut to the context of 300 tokens"
    assert cut_note(make_requests("chat", 5, random.Random(1), PLAIN), PLAIN) is None
    with pytest.raises(PromptError, match="context of 5 tokens has no room"):
        make_requests("chat", 1, random.Random(1), Vocabulary(5, COSTLY.words, exact=True, max_model_len=5))
