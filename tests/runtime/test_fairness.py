"""Fair shares: who floods the queue holds up nobody else, and with one owner nothing changes. No tensor, no model."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec import structs

from octavo.runtime.messages import AddRequest, SamplingParams, TokenOutput
from octavo.runtime.scheduling.plan import SchedulerConfig, StepPlan, StepResult
from octavo.runtime.scheduling.scheduler import Scheduler


def request(request_id: str, token_ids: list[int], **params: object) -> AddRequest:
    return AddRequest(request_id, token_ids, SamplingParams(**params), 0.0)


def scheduler(**limits: object) -> Scheduler:
    return Scheduler(SchedulerConfig(**{"block_size": 4, "max_model_len": 64} | limits))


def next_token(token_ids: list[int]) -> int:
    """A stand-in for the model: a function of the tokens alone."""
    return (sum((i + 1) * token for i, token in enumerate(token_ids)) + len(token_ids)) % 11


def step(it: Scheduler) -> tuple[StepPlan, list[TokenOutput]]:
    plan = it.plan()
    tokens = [[next_token(at.sequence.token_ids)] if at.wants == "token" else [] for at in plan.scheduled]
    return plan, it.commit(plan, StepResult(tokens))


def add(it: Scheduler, owner: str, count: int, length: int = 6, **params: object) -> None:
    for number in range(count):
        name = f"{owner}{number}"
        prompt = [(number + place) % 5 for place in range(length)]
        assert it.add(structs.replace(request(name, prompt, **params), owner=owner)) is None


def running(it: Scheduler) -> Counter[str]:
    return Counter(sequence.owner for sequence in it.running)


def run(it: Scheduler) -> tuple[list[str], dict[str, list[int]]]:
    """(the order of the first tokens, all tokens)."""
    order: list[str] = []
    tokens: dict[str, list[int]] = {}
    while it.has_work:
        for output in step(it)[1]:
            if output.request_id not in tokens:
                order.append(output.request_id)
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return order, tokens


def test_one_request_goes_before_a_thousand_of_another_owner() -> None:
    """Its first token comes with the first step that is planned after it has come."""
    it = scheduler(num_blocks=200, max_num_seqs=8, max_num_batched_tokens=64)
    add(it, "flood", 1000, max_tokens=20)
    for _ in range(5):
        step(it)
    assert running(it) == {"flood": 8}
    add(it, "b", 1, max_tokens=3)
    outputs = step(it)[1]
    assert "b0" in {output.request_id for output in outputs}
    assert running(it) == {"flood": 7, "b": 1}


def test_nothing_of_whoever_gives_way_is_lost() -> None:
    it = scheduler(num_blocks=60, max_num_seqs=4, max_num_batched_tokens=32)
    add(it, "flood", 12, max_tokens=15)
    for _ in range(4):
        step(it)
    add(it, "b", 4, max_tokens=9)
    _, tokens = run(it)
    assert {name: len(found) for name, found in tokens.items() if name[0] == "b"} == dict.fromkeys(
        ("b0", "b1", "b2", "b3"), 9
    )
    for number in range(12):
        known = [(number + place) % 5 for place in range(6)]
        for _ in range(15):
            known.append(next_token(known))
        assert known[6:][-len(tokens[f"flood{number}"]) :] == tokens[f"flood{number}"]


def test_two_floods_share_the_seats() -> None:
    it = scheduler(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=64)
    add(it, "a", 60, max_tokens=12)
    for _ in range(3):
        step(it)
    add(it, "b", 60, max_tokens=12)
    seen = []
    while it.waiting:
        step(it)
        seen.append(running(it))
    halves = seen[10:-10]  # behind what "a" had begun, and until one of them has nothing more to begin
    assert len(halves) > 100
    assert all(abs(counts["a"] - counts["b"]) <= 2 for counts in halves)


def test_with_one_owner_the_order_is_that_of_arrival() -> None:
    for owner in ("", "a"):
        it = scheduler(num_blocks=24, max_num_seqs=3, max_num_batched_tokens=16)
        add(it, owner, 20, max_tokens=7)
        order, _ = run(it)
        assert order == [f"{owner}{number}" for number in range(20)]
        assert it.stats().num_preemptions <= 20


@pytest.mark.parametrize("policy", ["fcfs", "priority", "lpm"])
def test_a_better_rank_gives_no_way(policy: str) -> None:
    it = scheduler(num_blocks=200, max_num_seqs=4, max_num_batched_tokens=64, policy=policy)
    for number in range(4):
        first = structs.replace(request(f"a{number}", [1, 2, 3], max_tokens=30), owner="a", priority=-1)
        assert it.add(first) is None
    step(it)
    assert it.add(structs.replace(request("b", [1, 2, 3], max_tokens=30), owner="b", priority=0)) is None
    step(it)
    assert running(it)["b"] == (0 if policy == "priority" else 1)
