"""What benchmarks/offline.py asks, and its table."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no package of the wheel

from benchmarks import offline

LOAD = offline.Load(["a", "b"], [30, 70])


def test_the_ratios_are_those_of_each_round() -> None:
    times = ((2.0, 3.0), (4.0, 4.0), (1.0, 2.0))
    rounds = [(LOAD, {"LLM": offline.Run(llm, 7200), "HTTP": offline.Run(http, 0)}) for llm, http in times]
    lines = offline.table(rounds).splitlines()
    assert lines[0] == "| round | LLM: tokens/s (cached) | HTTP: tokens/s (cached) | to HTTP |"
    assert lines[2] == "| 1 | 50 (7k) | 33 (0k) | 1.500 |"
    assert lines[-1] == "| median |  |  | 1.500 (1.000 to 2.000) |"


@pytest.mark.parametrize("kind", offline.LOADS)
def test_loads_are_new_in_each_round_and_as_large_as_asked(kind: str) -> None:
    first, again, second = (offline.load_of(kind, 96, seed) for seed in (1, 1, 2))
    assert first == again
    assert len(first.prompts) == len(first.tokens) == 96
    assert not {prompt.split()[0] for prompt in first.prompts} & {prompt.split()[0] for prompt in second.prompts}
    assert (min(first.tokens) >= 1, max(first.tokens) <= 200) == (True, True)
    assert 12 < statistics.median(first.tokens) < 48


def test_what_prompts_share() -> None:
    def beginnings(kind: str) -> list[str]:
        return [prompt.split()[0] for prompt in offline.load_of(kind, 96, 1).prompts]

    assert len(set(beginnings("free"))) == 96
    assert len(set(beginnings("few-shot"))) == offline.SHOTS
    documents = beginnings("documents")
    assert {documents.count(each) for each in documents} == {offline.QUESTIONS}
    assert len(set(beginnings("mixed"))) == 32 + offline.SHOTS + 32 // offline.QUESTIONS


def test_answers_of_other_lengths_are_no_measurement() -> None:
    offline.check([30, 70], LOAD)
    with pytest.raises(SystemExit, match="99 tokens in 2 answers, not 100 in 2"):
        offline.check([30, 69], LOAD)
