"""The engine on the toy model: what a request gets depends on its own tokens alone, however it is scheduled."""

from __future__ import annotations

import os
import random
import threading

import pytest
from slow_cases import slow
from torch import Tensor
from toy_model import (
    VOCAB,
    NaNModel,
    ToyModel,
    greedy,
    logits_after,
    make_engine,
    make_request,
    preemptions_and_hits,
    random_requests,
    run_to_end,
    run_with_arrivals,
    tokens_of,
)

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest


def random_engine(rng: random.Random) -> Engine:
    block_size = rng.choice([1, 2, 4, 16])
    return make_engine(
        block_size=block_size,
        max_model_len=64,
        num_blocks=-(-64 // block_size) + rng.randrange(24 // block_size + 1),
        max_num_seqs=rng.randrange(1, 10),
        max_num_batched_tokens=rng.choice([1, 3, 8, 64, 256]),
        enable_prefix_caching=rng.random() < 0.8,
        max_prompt_logits=rng.choice([1, 5, 256]),
        overlaps=rng.random() < 0.5,
    )


@pytest.mark.parametrize("seed", [*range(50), *map(slow, range(50, 150))])
def test_greedy_tokens_do_not_depend_on_the_schedule(seed: int) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, 12)
    engine = random_engine(rng)
    outputs = run_with_arrivals(engine, requests, rng)
    for request in requests:
        assert tokens_of(outputs[request.request_id]) == greedy(request)
        assert [o.finish_reason is not None for o in outputs[request.request_id]].count(True) == 1
    engine.scheduler.pool.check([])


def test_the_random_schedules_do_preempt_and_hit_the_prefix_cache() -> None:
    preemptions, hits = preemptions_and_hits(random_engine, range(8))
    assert preemptions > 5
    assert hits > 50


@pytest.mark.parametrize("seed", [*range(12), *map(slow, range(12, 30))])
def test_a_seed_gives_the_same_tokens_in_any_company(seed: int) -> None:
    settings = [
        {"temperature": 1.0},
        {"temperature": 2.0, "top_p": 0.9},
        {"temperature": 3.0, "top_k": 5},
        {"temperature": 5.0, "min_p": 0.2, "frequency_penalty": 0.1, "presence_penalty": 0.1},
        {"temperature": 4.0, "repetition_penalty": 1.5, "logit_bias": {3: 1.0}},
    ]
    rng = random.Random(seed)
    mine = make_request("mine", [1, 2, 3, 4, 5, 6, 7], max_tokens=30, seed=seed, **settings[seed % len(settings)])
    alone = tokens_of(run_to_end(make_engine(), [mine])["mine"])
    assert len(set(alone)) > 1
    others = random_requests(rng, 8) + random_requests(rng, 3, temperature=2.0, top_p=0.8, seed=5)
    others = [AddRequest(f"o{i}", o.token_ids, o.params, 0.0) for i, o in enumerate(others)]
    requests = [*others[:5], mine, *others[5:]]
    assert tokens_of(run_with_arrivals(random_engine(rng), requests, rng)["mine"]) == alone


def test_without_a_seed_two_requests_differ_and_a_restart_does_not() -> None:
    requests = [make_request(name, [1, 2, 3], temperature=9.0, max_tokens=20) for name in ("a", "b")]
    first, second = (run_to_end(make_engine(), requests) for _ in range(2))
    assert tokens_of(first["a"]) != tokens_of(first["b"])
    assert first["a"][0].token_ids == second["a"][0].token_ids


@pytest.mark.parametrize("seed", [*range(10), *map(slow, range(10, 25))])
def test_prompt_logprobs_are_those_of_the_model_for_every_position(seed: int) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, 6, prompt_logprobs=2, logprobs=3)
    outputs = run_with_arrivals(random_engine(rng), requests, rng)
    for request in requests:
        first = outputs[request.request_id][0]
        assert first.prompt_logprobs is not None
        assert first.prompt_logprobs[0] is None
        assert len(first.prompt_logprobs) == len(request.token_ids)
        for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
            assert entry is not None
            truth = logits_after(request.token_ids[:position]).double().log_softmax(0)
            assert entry.token_id == request.token_ids[position]
            assert entry.logprob == pytest.approx(
                float(truth[entry.token_id]), abs=8e-6
            )  # some roundings of numbers below 16
            assert entry.rank == int((truth > truth[entry.token_id]).sum()) + 1
            assert entry.top_ids == truth.topk(2).indices.tolist()


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"logprobs": 1, "prompt_logprobs": 1}])
def test_nan_logits_end_their_request_and_no_other(params: dict[str, object]) -> None:
    engine = make_engine(NaNModel())
    outputs = run_to_end(engine, [make_request("good", [1, 2, 3]), make_request("bad", [1, 13, 2], **params)])
    assert tokens_of(outputs["good"])[0] == int(logits_after([1, 2, 3]).argmax())
    assert [o.finish_reason for o in outputs["bad"]] == ["error"]
    assert "not finite" in (outputs["bad"][0].error or "")
    engine.scheduler.pool.check([])


def test_a_request_that_excludes_every_token_ends_with_an_error() -> None:
    bad = make_request("bad", [1], allowed_token_ids=(4,), stop_token_ids=(4,), min_tokens=2)
    outputs = run_to_end(make_engine(), [bad, make_request("good", [1])])
    assert "no token may be sampled" in (outputs["bad"][0].error or "")
    assert len(tokens_of(outputs["good"])) == 8


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": -1.0}, "temperature -1.0 is not between 0 and"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": -1}, "top_k -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"max_tokens": 0}, "max_tokens 0 is not between 1 and inf"),
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias names token id {VOCAB}, which is not in the vocabulary"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias of token 1 is inf"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids names token id -1"),
    ],
)
def test_bad_parameters_end_their_request(params: dict[str, object], message: str) -> None:
    outputs = run_to_end(make_engine(), [make_request("bad", [1, 2], **params), make_request("good", [1])])
    assert message in (outputs["bad"][0].error or "")
    assert len(tokens_of(outputs["good"])) == 8


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_prompt_outside_the_vocabulary_is_refused(token: int) -> None:
    outputs = run_to_end(make_engine(), [make_request("bad", [1, token])])
    assert f"prompt token id {token} is not in the vocabulary of {VOCAB} tokens" in (outputs["bad"][0].error or "")


class _Gate(ToyModel):
    """Computes a step when it is let through, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Semaphore(0)
        self.has_begun = threading.Semaphore(0)
        self.num_steps = 0

    def forward(self, inputs: StepInputs, caches: list[LayerCache], *_: object) -> Tensor:
        self.num_steps += 1
        self.has_begun.release()
        self.open.acquire()
        return super().forward(inputs, caches)


def test_requests_that_come_while_a_step_is_computed_join_the_next() -> None:
    model = _Gate()
    engine = make_engine(model)
    assert not engine.add(make_request("a", [1, 2, 3]))
    engine.advance()
    model.has_begun.acquire()
    assert not engine.add(make_request("b", [4, 5, 6]))
    engine.admit()  # the second step is planned, and waits for the first
    model.open.release(100)
    assert [output.request_id for output in engine.finish()] == ["a"]
    assert [output.request_id for output in engine.finish()] == ["a", "b"]


def test_a_step_that_has_begun_is_left_as_it_is() -> None:
    model = _Gate()
    engine = make_engine(model)
    engine.add(make_request("a", [1, 2, 3]))
    engine.advance()
    model.open.release(100)
    for _ in range(2):
        model.has_begun.acquire()
    engine.add(make_request("b", [4, 5, 6]))
    engine.admit()
    assert [output.request_id for output in engine.finish()] == ["a"]
    assert [output.request_id for output in engine.finish()] == ["a"]
    assert {output.request_id for output in engine.step()} == {"a", "b"}


def test_nobody_waits_for_a_step_behind_the_last_stop_token() -> None:
    model = _Gate()
    model.open.release(100)
    engine = make_engine(model)
    requests = []
    for name, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6])):
        last = greedy(make_request(name, prompt, max_tokens=3))[-1]
        requests.append(make_request(name, prompt, stop_token_ids=(last,)))
    outputs = run_to_end(engine, requests)
    assert [outputs[name][-1].finish_reason for name in ("a", "b")] == ["stop", "stop"]
    assert model.num_steps == 3


class _Broken(ToyModel):
    def forward(self, *_: object) -> Tensor:
        raise MemoryError("no room for the step")


@pytest.mark.parametrize("overlaps", [True, False])
def test_what_a_step_raises_is_raised_where_its_result_is_awaited(overlaps: bool) -> None:
    engine = make_engine(_Broken(), overlaps=overlaps)
    engine.add(make_request("a", [1, 2, 3]))
    with pytest.raises(MemoryError, match="no room for the step"):
        engine.step()


def test_steps_are_told_by_what_every_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python on macOS has no eventfd."""
    for name in ("eventfd", "eventfd_read", "eventfd_write"):
        monkeypatch.delattr(os, name, raising=False)
    request = make_request("a", [1, 2, 3])
    assert tokens_of(run_to_end(make_engine(), [request])["a"]) == greedy(request)
