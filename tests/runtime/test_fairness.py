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


def prompt(start: int, length: int) -> list[int]:
    """No two of them share a block."""
    return list(range(start, start + length))


def ask(it: Scheduler, owner: str, number: int, length: int, **params: object) -> str:
    name = f"{owner}{number}"
    made = structs.replace(request(name, prompt(100_000 * (number + 1), length), **params), owner=owner)
    assert it.add(made) is None
    return name


def tokens_until_first(it: Scheduler, name: str, most_ahead: int = 1) -> int:
    """The tokens that are computed from now on until this request's first one comes, as the engine plans: ahead."""
    total = 0
    plans = [it.plan()]
    has_come = False
    while plans:
        while len(plans) <= most_ahead and not has_come:
            plans.append(it.plan())
        plan = plans.pop(0)
        total += 0 if has_come else plan.num_tokens
        tokens = [[7] if at.wants == "token" else [] for at in plan.scheduled]
        has_come |= name in {output.request_id for output in it.commit(plan, StepResult(tokens))}
    return total


LIMITS = {"block_size": 16, "max_model_len": 40_000, "num_blocks": 20_000, "max_num_seqs": 16}


@pytest.mark.parametrize("length", [200, 2000, 30_000])
def test_long_prompts_of_another_owner_hold_up_a_first_token_by_their_part_of_few_steps(length: int) -> None:
    """Two steps are ordered when a request comes; behind them comes its own."""
    it = scheduler(**LIMITS)
    ask(it, "b", 0, 8, max_tokens=2)
    run(it)
    for number in range(60):
        ask(it, "a", number, length, max_tokens=500)
    worst = 0
    for number in range(1, 30):
        for _ in range(number % 7):
            step(it)
        part = it.config.shared_tokens
        own = 400
        name = ask(it, "b", number, own, max_tokens=2)
        worst = max(worst, tokens_until_first(it, name) - own)
    assert worst <= 3 * (part + it.config.max_num_seqs)


@pytest.mark.parametrize("num_before", [0, 1, 4, 20])
def test_who_has_nothing_running_waits_for_nobodys_answer(num_before: int) -> None:
    """However much was asked a moment ago: those answers have ended, and those of the flood take long."""
    it = scheduler(**LIMITS)
    for number in range(60):
        ask(it, "a", number, 20, max_tokens=2000)
    for _ in range(20):
        step(it)
    for number in range(num_before):
        ask(it, "b", number, 200, max_tokens=300)
        tokens_until_first(it, f"b{number}", most_ahead=0)
        it.abort([f"b{number}"])  # as when a stop string ends it
        step(it)
    name = ask(it, "b", num_before, 200, max_tokens=300)
    outputs = step(it)[1]
    assert name in {output.request_id for output in outputs}


def test_the_cache_is_full_of_a_flood_and_one_request_keeps_its_blocks() -> None:
    """Answers of the flood grow, and give way to each other rather than end the only request of the other."""
    it = scheduler(**LIMITS | {"num_blocks": 150})
    for number in range(30):
        ask(it, "a", number, 150, max_tokens=300)
    for _ in range(20):
        step(it)
    name = ask(it, "b", 0, 700, max_tokens=200)
    assert tokens_until_first(it, name) <= 700 + 3 * (it.config.shared_tokens + it.config.max_num_seqs)
    b = it._live[name]
    while name in it._live:
        step(it)
    assert b.num_preemptions == 0
    assert it.stats().num_preemptions > 0


def test_whoever_asks_alone_gets_whole_steps() -> None:
    it = scheduler(**LIMITS)
    for owner in ("b", "a"):  # another one asked, long ago
        for number in range(600):
            ask(it, owner, number, 3000, max_tokens=1)
        sizes = []
        while it.has_work:
            sizes.append(step(it)[0].num_tokens)
        assert set(sizes[-300:-1]) == {it.config.max_num_batched_tokens}


def test_a_whole_prompt_is_never_divided_by_its_owners_share() -> None:
    """An encoder reads a text at once: each is in one step, also one longer than the share, and others go on."""
    limits = {"num_blocks": 400, "max_model_len": 200, "max_num_batched_tokens": 200, "shared_tokens": 10}
    it = scheduler(**limits, whole_prompts=True, enable_prefix_caching=False)
    add(it, "flood", 6, length=7, max_tokens=1)
    add(it, "long", 6, length=150, max_tokens=1)
    add(it, "b", 1, length=6, max_tokens=1)
    seen: Counter[str] = Counter()
    together = []
    while it.has_work:
        plan, _ = step(it)
        assert plan.scheduled
        assert all(at.start == 0 and at.end == at.sequence.num_prompt for at in plan.scheduled)
        together.append([at.sequence.request_id for at in plan.scheduled])
        seen.update(together[-1])
    assert set(seen.values()) == {1}
    assert len(seen) == 13
    assert set(together[0]) == {"flood0", "long0", "b0"}
