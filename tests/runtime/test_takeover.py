"""An answer that one engine has begun and another one goes on with: the same as if nothing had happened.

The toy model is exact, so that whatever differs is the engine's fault.
"""

from __future__ import annotations

import random

import msgspec
import pytest
from constrained_toy import END, constrained_engine, one_of, run
from llguidance import LLMatcher
from toy_model import VOCAB, make_engine, make_request, run_to_end, tokens_of

from octavo.runtime.messages import AddRequest, Constraint, Reasoning, RepetitionDetection, TokenOutput, Triggers

LARK = 'start: "{" /[a-z]{3,9}/ (":" | ",") /[A-Z ]*/ "}"'
PARAMS: dict[str, dict[str, object]] = {
    "greedy": {},
    "seeded": {"temperature": 2.0, "top_p": 0.9, "seed": 11},
    "penalties": {
        "temperature": 4.0,
        "seed": 5,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.3,
    },
    "min_tokens": {"min_tokens": 17, "stop_token_ids": tuple(range(0, VOCAB, 3))},
    "stop": {"stop_token_ids": tuple(range(0, VOCAB, 16))},
    "logprobs": {"logprobs": 3, "temperature": 1.0, "seed": 2},
    "forbidden": {"forbidden": ((3,), (7, 8), *((a, b) for a in range(20) for b in range(20))), "logit_bias": {9: 2.0}},
    "repetition": {"logit_bias": {4: 50.0}, "repetition": RepetitionDetection(4, 1, 20)},
    "grammar": {"constraint": Constraint(LLMatcher.grammar_from_lark(LARK)), "stop_token_ids": (END,)},
    "words": {"constraint": one_of(["quite long, is it not", "quite long as well, abba"])},
    "thinks": {
        "constraint": one_of(
            ["quite long, is it not"], reasoning=Reasoning(end=(5,), is_open=True, budget=6, closing=(8, 9, 5))
        )
    },
    "triggers": {
        "logit_bias": {0: 5.0},
        "constraint": Constraint(LLMatcher.grammar_from_lark(LARK), triggers=Triggers(texts=("{",))),
    },
}


def begin_of(outputs: list[TokenOutput], count: int) -> list[int]:
    """The tokens of the first `count` outputs: what a server has been told."""
    return tokens_of(outputs[:count])


def continued(request: AddRequest, so_far: list[int]) -> AddRequest:
    return msgspec.structs.replace(request, token_ids=[*request.token_ids, *so_far], num_prompt=len(request.token_ids))


@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("name", PARAMS)
def test_an_answer_goes_on_where_it_was(name: str, jumps: bool) -> None:
    """From whatever output on, in one engine after the other."""
    request = make_request("a", [7, 1, 30, 2, 9], max_tokens=24, **PARAMS[name])
    (whole,) = run(constrained_engine(jumps_forward=jumps), [request]).values()
    assert len(tokens_of(whole)) > 3
    for count in {*range(0, len(whole), 6), len(whole) - 1}:
        so_far = begin_of(whole, count)
        company = [make_request(f"b{n}", [n] * 9, max_tokens=9) for n in range(3)]
        engine = constrained_engine(jumps_forward=jumps, max_num_batched_tokens=8)
        rest = run(engine, [*company, continued(request, so_far)])["a"]
        assert so_far + tokens_of(rest) == tokens_of(whole)
        assert (rest[-1].finish_reason, rest[-1].stop_token_id) == (whole[-1].finish_reason, whole[-1].stop_token_id)
        found = [entry for output in rest for entry in output.logprobs or []]
        assert found == [entry for output in whole[count:] for entry in output.logprobs or []]


def test_each_of_several_answers_goes_on_by_its_own_seed() -> None:
    request = msgspec.structs.replace(
        make_request("a", [1, 2, 3], temperature=3.0, seed=7, max_tokens=12), other_ids=["b", "c"]
    )
    whole: dict[str, list[TokenOutput]] = {"a": [], "b": [], "c": []}
    engine = make_engine()
    engine.add(request)
    while engine.has_work:
        for output in engine.step():
            whole[output.request_id].append(output)
    parts = [
        continued(answer, tokens_of(whole[answer.request_id])[: 3 + n]) for n, answer in enumerate(request.answers())
    ]
    rest = run_to_end(make_engine(), parts)
    for number, (name, outputs) in enumerate(whole.items()):
        assert tokens_of(rest[name]) == tokens_of(outputs)[3 + number :]


def test_prompt_log_probabilities_are_those_of_the_prompt_alone() -> None:
    request = make_request("a", [1, 2, 3, 4, 5, 6], prompt_logprobs=2)
    (whole,) = run_to_end(make_engine(), [request]).values()
    (rest,) = run_to_end(make_engine(), [continued(request, tokens_of(whole[:3]))]).values()
    assert rest[0].prompt_logprobs == whole[0].prompt_logprobs
    assert len(rest[0].prompt_logprobs or []) == 6


def test_preemption_and_caching_know_of_no_difference() -> None:
    rng = random.Random(3)
    requests = [
        make_request(f"r{n}", [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))], max_tokens=20)
        for n in range(12)
    ]
    whole = run_to_end(make_engine(), requests)
    parts = [continued(one, tokens_of(whole[one.request_id])[: rng.randrange(1, 20)]) for one in requests]
    engine = make_engine(num_blocks=16, max_model_len=64, max_num_batched_tokens=16)
    rest = run_to_end(engine, parts)
    for one, part in zip(requests, parts, strict=True):
        assert part.token_ids[part.prompt_length :] + tokens_of(rest[one.request_id]) == tokens_of(
            whole[one.request_id]
        )
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits <= stats.prefix_cache_queries


def test_answers_to_one_prompt_share_it_in_the_step_that_computes_it() -> None:
    """As they did in the engine that began them."""
    prompt = list(range(40))
    engine = make_engine(max_num_batched_tokens=512)
    run_to_end(engine, [continued(make_request(f"r{n}", prompt), [n, n + 1, n + 2]) for n in range(4)])
    assert engine.scheduler.stats().prefix_cache_hits == 3 * 40


@pytest.mark.parametrize(("so_far", "num_prompt"), [([1] * 8, 3), ([1] * 9, 3), ([], 4)])
def test_what_can_not_be_continued_is_refused(so_far: list[int], num_prompt: int) -> None:
    request = msgspec.structs.replace(make_request("a", [1, 2, 3, *so_far]), num_prompt=num_prompt)
    (refusal,) = make_engine().add(request)
    assert f"num_prompt {num_prompt}" in (refusal.error or "")
