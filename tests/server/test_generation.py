"""Whole answers are joined of what the steps brought, up to a size that the server can keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from octavo_server import TINY

from octavo.runtime.messages import Logprobs
from octavo.server import generation
from octavo.server.dialects.completions import CompletionRequest, wanted_of
from octavo.server.draft_metrics import DraftReports
from octavo.server.errors import ApiError
from octavo.server.generation import Delta
from octavo.server.message.parts import Part, text_of
from octavo.server.options import StructuredOutputsConfig
from octavo.server.prompts import Prompt
from octavo.text.tokenizer import Tokenizer


def test_a_prompt_is_sent_once_whatever_the_number_of_its_answers() -> None:
    request = CompletionRequest(model="m", prompt=[[1, 2, 3], [4, 5]], n=128, seed=7, max_tokens=4)
    model: Any = SimpleNamespace(
        tokenizer=Tokenizer.open(TINY),
        max_model_len=64,
        vocab_size=1024,
        defaults={},
        end_ids=frozenset({2}),
        max_logprobs=5,
        clamps_max_tokens=False,
        server_name="",
        structured_outputs=StructuredOutputsConfig(),
        token_id=lambda _: None,
        adapter=lambda _: None,
        serves=lambda _: True,
        draft_reports=DraftReports(),
        encoder=None,
        images=None,
    )
    choices = generation.make_choices([Prompt([1, 2, 3]), Prompt([4, 5])], request, wanted_of(request), model)
    sent = list({id(choice.sent): choice.sent for choice in choices}.values())
    assert [(one.token_ids, len(one.request_ids)) for one in sent] == [([1, 2, 3], 128), ([4, 5], 128)]
    assert [choice.request.request_id for choice in choices] == sent[0].request_ids + sent[1].request_ids
    assert [choice.request.params.seed for choice in choices] == [*range(7, 135)] * 2
    assert all(choice.request.token_ids is choice.sent.token_ids for choice in choices)


def delta(index: int, *token_ids: int, **more: Any) -> Delta:
    entries = [Logprobs(token_id, -1.0, 1, [1, 2], [-1.0, -2.0]) for token_id in token_ids]
    return Delta(
        index, [Part("text", "x" * len(token_ids))], list(token_ids), entries, list(range(len(token_ids))), **more
    )


def fold(steps: list[list[Delta]]) -> tuple[list[Delta], bool]:
    """The joined deltas, and whether the steps were closed."""
    closed = []

    async def generate() -> AsyncGenerator[list[Delta], None]:
        try:
            for step in steps:
                yield step
        finally:
            closed.append(True)

    return asyncio.run(generation.fold(generate(), 2)), bool(closed)


def test_deltas_of_each_choice_are_joined_in_order() -> None:
    steps = [[delta(1, 5)], [delta(0, 6), delta(1, 7, finish_reason="stop", stop_reason="z")]]
    steps += [[delta(0, 8, 9, finish_reason="length")]]
    (first, second), closed = fold(steps)
    assert (first.token_ids, text_of(first.parts), first.finish_reason, first.stop_reason) == (
        [6, 8, 9],
        "xxx",
        "length",
        None,
    )
    assert (second.token_ids, second.finish_reason, second.stop_reason) == ([5, 7], "stop", "z")
    assert len(first.logprobs) == 3
    assert closed


def test_an_answer_too_large_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [[delta(0, 1), delta(1, 2)], [delta(0, 3, prompt_logprobs=[None, Logprobs(1, -1.0, 1, [], [])])]]
    size = sum(one.size for step in steps for one in step)
    assert size == 4 + 4 + 4 + 1
    monkeypatch.setattr(generation, "MAX_WHOLE", size)
    fold(steps)
    monkeypatch.setattr(generation, "MAX_WHOLE", size - 1)
    with pytest.raises(ApiError) as caught:
        fold(steps)
    assert (caught.value.status, caught.value.param) == (400, "stream")
