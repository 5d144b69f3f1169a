"""The scheduler under random traffic with a tiny pool, and each of its rules alone. No tensor, no model."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.runtime.messages import AddRequest, SamplingParams, TokenOutput
from octavo.runtime.scheduling.scheduler import Sampled, Scheduler, SchedulerConfig, StepPlan

STOP = 7


def request(request_id: str, token_ids: list[int], **params: object) -> AddRequest:
    return AddRequest(request_id, token_ids, SamplingParams(**({"max_tokens": 4} | params)), 0.0)


def scheduler(**limits: object) -> Scheduler:
    config = {"num_blocks": 16, "block_size": 4, "max_model_len": 64} | limits
    return Scheduler(SchedulerConfig(**config))


def next_token(token_ids: list[int]) -> int:
    """A stand-in for the model: a function of the tokens alone."""
    return (sum((i + 1) * token for i, token in enumerate(token_ids)) + len(token_ids)) % 11


def step(it: Scheduler) -> tuple[StepPlan, list[TokenOutput]]:
    plan = it.plan()
    sampled = Sampled([next_token(work.sequence.token_ids) for work in plan.works if work.samples])
    return plan, it.commit(plan, sampled)


def run(it: Scheduler) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while it.has_work:
        for output in step(it)[1]:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


class Traffic(RuleBasedStateMachine):
    """Adds, aborts, steps and resets in any order; the invariants hold after each."""

    block_size = 2
    max_model_len = 24

    def __init__(self) -> None:
        super().__init__()
        self.it = scheduler(
            num_blocks=12, block_size=2, max_model_len=24, max_num_seqs=4, max_num_batched_tokens=7, max_prompt_logits=3
        )
        self.live: dict[str, AddRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: Counter[str] = Counter()
        self.num_added = 0

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=23),
        max_tokens=st.integers(1, 12),
        stops=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def add(self, tokens: list[int], max_tokens: int, stops: bool, prompt_logprobs: int | None) -> None:
        name = f"r{self.num_added}"
        self.num_added += 1
        stop_ids = (STOP,) if stops else ()
        it = request(name, tokens, max_tokens=max_tokens, stop_token_ids=stop_ids, prompt_logprobs=prompt_logprobs)
        assert self.it.add(it) is None
        self.live[name] = it
        self.tokens[name] = []

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.live)), max_size=2))
        self.it.abort([*names, "unknown"])
        for name in names:
            self.live.pop(name, None)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.it.reset_prefix_cache()

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.it.has_work:
                self.step()

    def step(self) -> None:
        plan = self.it.plan()
        assert plan.works, "a step must advance something"
        assert plan.num_tokens == sum(work.end - work.start for work in plan.works) <= 7
        assert sum(w.end - w.first_logit for w in plan.works if w.sequence.wants_prompt_logprobs) <= 3
        if plan.num_tokens == len(plan.works):  # whom a GPU would have read what another writes
            held = Counter(block for work in plan.works for block in work.sequence.blocks)
            assert all(held[work.sequence.blocks[work.start // self.block_size]] == 1 for work in plan.works)
        for work in plan.works:
            sequence = work.sequence
            assert sequence.num_computed == work.start < work.end <= len(sequence.token_ids)
            assert len(sequence.blocks) == -(-work.end // 2)
            assert work.samples == (work.end == len(sequence.token_ids))
        self.it.pool.check([sequence.blocks for sequence in self.it.running])
        prompt_logprobs = {
            index: [None] * (min(work.end, work.sequence.num_prompt - 1) - work.first_logit)
            for index, work in enumerate(plan.works)
            if work.sequence.wants_prompt_logprobs
        }
        tokens = [next_token(work.sequence.token_ids) for work in plan.works if work.samples]
        for output in self.it.commit(plan, Sampled(tokens, prompt_logprobs=prompt_logprobs)):
            self.receive(output)

    def receive(self, output: TokenOutput) -> None:
        it = self.live[output.request_id]
        mine = self.tokens[output.request_id]
        if not mine and it.params.prompt_logprobs is not None:
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(it.token_ids)
            assert output.num_cached_tokens == 0
        for token in output.token_ids:
            assert token == next_token(it.token_ids + mine)
            mine.append(token)
        if output.finish_reason is not None:
            self.ends[output.request_id] += 1
            del self.live[output.request_id]
            length = len(it.token_ids) + len(mine)
            if output.finish_reason == "stop":
                assert mine[-1] in it.params.stop_token_ids
            else:
                assert output.finish_reason == "length"
                assert len(mine) == it.params.max_tokens or length == self.max_model_len

    @invariant()
    def books_are_right(self) -> None:
        self.it.pool.check([sequence.blocks for sequence in self.it.running])
        running, waiting = self.it.running, list(self.it.waiting.values())
        rows = [sequence.row for sequence in running]
        assert len(set(rows)) == len(rows) <= 4
        assert min(rows, default=0) >= 0
        assert all(sequence.row == -1 and not sequence.blocks for sequence in waiting)
        order = [sequence.number for sequence in running + waiting]
        assert order == sorted(order), "first come, first served"
        assert {sequence.request_id for sequence in running + waiting} == set(self.live)

    def teardown(self) -> None:
        for _ in range(10_000):
            if not self.it.has_work:
                break
            self.step()
        assert not self.live
        assert set(self.ends.values()) <= {1}
        assert self.it.pool.num_free == 12
        self.it.pool.check([])


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_decodes_come_first_then_prompts_in_chunks() -> None:
    it = scheduler(max_num_batched_tokens=10)
    it.add(request("a", list(range(4)), max_tokens=9))
    step(it)
    it.add(request("b", list(range(10, 40)), max_tokens=9))
    sizes = []
    for _ in range(4):
        plan, _ = step(it)
        sizes.append([(work.sequence.request_id, work.end - work.start) for work in plan.works])
    assert sizes[:3] == [[("a", 1), ("b", 9)]] * 3
    assert sizes[3] == [("a", 1), ("b", 3)]


def test_a_prefix_is_computed_once_and_its_last_token_always() -> None:
    it = scheduler()
    prompt = list(range(8))
    it.add(request("a", prompt, max_tokens=1))
    run(it)
    it.add(request("b", prompt, max_tokens=1))
    plan, outputs = step(it)
    assert [(work.start, work.end) for work in plan.works] == [(4, 8)]
    assert outputs[0].num_cached_tokens == 4
    stats = it.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (16, 4)


def test_requests_of_one_step_share_their_prompt() -> None:
    it = scheduler()
    for name in ("a", "b", "c"):
        it.add(request(name, list(range(10)), max_tokens=1))
    plan, _ = step(it)
    assert [(work.start, work.end) for work in plan.works] == [(0, 10), (8, 10), (8, 10)]


def test_a_block_that_one_token_fills_is_shared_from_the_next_step_on() -> None:
    """On a GPU a step of single tokens attends while it writes: its readers would meet its writer."""
    it = scheduler(max_num_batched_tokens=7)
    it.add(request("a", [0, 1, 2, 3, 4, 5, 6], max_tokens=4))
    step(it)
    tokens = it.running[0].token_ids[:8]
    it.add(request("b", [*tokens, 9], max_tokens=1))
    plan, _ = step(it)
    assert [(work.sequence.request_id, work.start, work.end) for work in plan.works] == [("a", 7, 8), ("b", 4, 9)]
    it.add(request("c", [*tokens, 8], max_tokens=1))
    plan, _ = step(it)
    assert [(work.sequence.request_id, work.start, work.end) for work in plan.works] == [("a", 8, 9), ("c", 8, 9)]
    assert plan.works[1].sequence.num_cached == 8


def test_prefixes_are_shared_under_one_cache_salt_alone() -> None:
    def num_cached(salt: str, prompt: list[int]) -> int | None:
        it.add(AddRequest("one", prompt, SamplingParams(max_tokens=1), 0.0, cache_salt=salt))
        return step(it)[1][0].num_cached_tokens

    it = scheduler()
    prompt = list(range(9))
    assert [num_cached(salt, prompt) for salt in ("", "", "a", "a", "b")] == [0, 8, 0, 8, 0]
    spelled = array("I", prompt[:4]).tobytes().decode()  # a salt of the bytes that name the first block
    assert num_cached(spelled, [4, 5, 6, 7, 9]) == 0


def test_prefix_caching_can_be_off() -> None:
    it = scheduler(enable_prefix_caching=False)
    for name in ("a", "b"):
        it.add(request(name, list(range(10)), max_tokens=1))
    plan, _ = step(it)
    assert [(work.start, work.end) for work in plan.works] == [(0, 10), (0, 10)]


def test_a_reset_forgets_what_nobody_holds() -> None:
    it = scheduler()
    it.add(request("a", list(range(8)), max_tokens=1))
    run(it)
    it.reset_prefix_cache()
    it.add(request("b", list(range(8)), max_tokens=1))
    plan, _ = step(it)
    assert plan.works[0].start == 0


def test_the_latest_arrival_gives_way_and_loses_nothing() -> None:
    roomy, tight = scheduler(num_blocks=64), scheduler(num_blocks=9)
    for it in (roomy, tight):
        for name in ("a", "b", "c"):
            it.add(request(name, [ord(name)] * 6, max_tokens=20))
    assert run(roomy) == run(tight)
    assert tight.stats().num_preemptions > 0
    assert tight.pool.num_free == 9


@pytest.mark.parametrize(
    ("prompt", "limits", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "the prompt has 64 tokens; with max_model_len 64 it may have 63 at most"),
        ([1] * 16, {"num_blocks": 4}, "may need 19 tokens of KV cache, 5 blocks of 4; the cache has 4 blocks"),
    ],
)
def test_what_can_never_run_is_refused(prompt: list[int], limits: dict[str, int], message: str) -> None:
    it = scheduler(**limits)
    output = it.add(request("a", prompt))
    assert output is not None
    assert output.finish_reason == "error"
    assert message in (output.error or "")
    assert not it.has_work


def test_a_request_that_exactly_fills_the_pool_runs() -> None:
    it = scheduler(num_blocks=4)
    it.add(request("a", [1] * 13, max_tokens=4, min_tokens=4))  # 17 tokens, of which 16 are computed
    assert len(run(it)["a"]) == 4


def test_a_reused_id_ends_both_requests_with_one_error() -> None:
    it = scheduler()
    it.add(request("a", [1, 2, 3]))
    step(it)
    output = it.add(request("a", [4, 5, 6]))
    assert output is not None
    assert "in use" in (output.error or "")
    assert not it.has_work
    it.pool.check([])


def test_stop_tokens_count_after_min_tokens_and_context_ends_at_max_model_len() -> None:
    it = scheduler(max_model_len=12)
    it.add(request("a", [1] * 4, max_tokens=50))
    outputs = []
    while it.has_work:
        outputs += step(it)[1]
    assert len(outputs) == 8
    assert outputs[-1].finish_reason == "length"
    first = next_token([1] * 4)
    for min_tokens, ends in ((0, 1), (1, 0)):
        it.add(request("b", [1] * 4, stop_token_ids=(first,), min_tokens=min_tokens, max_tokens=2))
        _, (output,) = step(it)
        assert (output.finish_reason == "stop") == bool(ends)
        assert output.stop_token_id == (first if ends else None)
        it.abort(["b"])


def test_an_error_ends_one_request_and_its_blocks_are_not_trusted_again() -> None:
    it = scheduler()
    for name in ("a", "b"):
        it.add(request(name, [ord(name)] * 9))
    plan = it.plan()
    outputs = it.commit(plan, Sampled([0, 0], errors={0: "NaN"}))
    assert [(o.request_id, o.error, o.finish_reason) for o in outputs] == [("a", "NaN", "error"), ("b", None, None)]
    it.abort(["b"])
    it.pool.check([])
    it.add(request("c", [ord("a")] * 9))
    it.add(request("d", [ord("b")] * 9))
    assert [work.start for work in it.plan().works] == [0, 8]


def test_the_first_output_brings_the_times() -> None:
    ticks = iter(range(100, 200))
    it = Scheduler(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32), clock=lambda: float(next(ticks)))
    it.add(request("a", [1, 2, 3]))
    _, (first,) = step(it)
    _, (second,) = step(it)
    assert (first.scheduled_time, first.first_token_time) == (100.0, 101.0)
    assert (second.scheduled_time, second.first_token_time, second.num_cached_tokens) == (None, None, None)
