"""Which answers may have killed an engine: those that its last batch may have held."""

from __future__ import annotations

from typing import Any

from octavo.runtime.messages import AddRequest, SamplingParams, TokenOutput
from octavo.server.fleet.open_answer import OpenAnswer, in_batch

NOBODY: Any = None  # reads them


def answer(name: str, *, has_begun: bool = False, is_silent: bool = True) -> OpenAnswer:
    """has_begun: in whatever engine. is_silent: the one that has it has said nothing of it."""
    it = OpenAnswer(AddRequest(name, [1], SamplingParams(9), 0.0), 0, NOBODY)
    if has_begun or not is_silent:
        it.first_output(TokenOutput(name, [2]))
    it.is_silent = is_silent
    return it


def test_what_waited_behind_others_was_not_in_the_batch() -> None:
    answers = [answer("speaks", is_silent=False), answer("first"), answer("second"), answer("third")]
    assert in_batch(answers, 0) == {"speaks", "first", "second", "third"}
    assert in_batch(answers, 2) == {"speaks", "first"}
    assert in_batch(answers, 9) == {"speaks"}


def test_what_had_begun_elsewhere_was_before_what_had_not() -> None:
    answers = [answer("waits"), answer("begun", has_begun=True), answer("waits too")]
    assert in_batch(answers, 2) == {"begun"}
    assert in_batch(answers, 1) == {"begun", "waits"}
