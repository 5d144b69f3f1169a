"""The table of benchmarks/offline.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no package of the wheel

from benchmarks import offline

from octavo import SamplingParams


def test_the_ratio_is_that_of_each_round() -> None:
    lines = offline.table([(2.0, 3.0), (4.0, 4.0), (1.0, 2.0)], num_prompts=100, num_tokens=8).splitlines()
    assert lines[2] == "| 1 | 400 | 267 | 1.500 |"
    assert lines[-1] == "| median | | | 1.500 (1.000 to 2.000) |"


def test_prompts_are_new_in_each_round() -> None:
    first, again, second = (offline.prompts_of(50, 8, seed) for seed in (1, 1, 2))
    assert first == again
    assert len({prompt.split()[0] for prompt in first + second}) > 95
    assert {len(prompt.split()) for prompt in first} == {9}


def test_answers_of_other_lengths_are_no_measurement() -> None:
    params = SamplingParams(max_tokens=4)
    offline.check(40, 10, params)
    with pytest.raises(SystemExit, match="39 tokens for 10 prompts of 4"):
        offline.check(39, 10, params)
