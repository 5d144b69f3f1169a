"""The table of benchmarks/takeover.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no package of the wheel

from benchmarks import takeover
from benchmarks.takeover import Answer, Round


def test_a_stream_is_whole_or_cut_or_failed() -> None:
    event = 'data: {"choices": [{"text": "a", "finish_reason": null}]}'
    last = 'data: {"choices": [{"text": "b", "finish_reason": "length"}]}'
    error = 'data: {"error": {"message": "it is gone"}}'
    done = "data: [DONE]"
    assert outcome(event, last, done) == "whole"
    assert outcome(event, last) == outcome(event, error, done) == "cut"
    assert outcome(error, done) == outcome() == "failed"


def outcome(*lines: str) -> str:
    found = Answer()
    for line in lines:
        found.take(line)
    return found.outcome


def of(death: float | None, outcomes: list[str], equal: list[bool], *, is_late: bool = False) -> Round:
    return Round("cell", "-x", death, is_late, outcomes, equal, [float(n) for n in range(len(outcomes))], 1.0)


def test_shares_are_means_of_rounds_and_pauses_those_of_whole_streams() -> None:
    rounds = [
        of(0.5, ["whole", "whole", "cut", "failed"], [True, False, False, False]),
        of(0.5, ["whole"] * 4, [True] * 4),
        of(0.5, ["cut"] * 4, [False] * 4, is_late=True),  # nothing was open any more: it says nothing
        of(None, ["whole"] * 4, [True] * 4),
    ]
    assert takeover.table(rounds).splitlines()[2:] == [
        "| cell, `-x` | 2 | 8 | 75.0 (50.0 to 100.0) | 12.5 (0.0 to 25.0) | 12.5 (0.0 to 25.0) "
        "| 75.0 (50.0 to 100.0) | 100 | 1.00, 3.00, 3.00 |"
    ]
