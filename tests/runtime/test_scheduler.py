"""The scheduler under random traffic with a tiny pool, and each of its rules alone. No tensor, no model."""

from __future__ import annotations

from array import array
from collections import Counter, deque

import pytest
import vllm_kv_events
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import msgpack, structs
from vllm_kv_events import KVIndex

from octavo.runtime.config import Policy
from octavo.runtime.messages import AddRequest, SamplingParams, TokenOutput
from octavo.runtime.scheduling.kv_events import KVEventBatch
from octavo.runtime.scheduling.kv_groups import Windows, group_of
from octavo.runtime.scheduling.plan import (
    ScheduledSequence,
    SchedulerConfig,
    StepPlan,
    StepResult,
    last_token_of,
)
from octavo.runtime.scheduling.scheduler import Scheduler
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.vision.recipes import PromptImage

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
    """One step, planned when the one before it is committed."""
    plan = it.plan()
    tokens = [[next_token(at.sequence.token_ids)] if at.wants == "token" else [] for at in plan.scheduled]
    return plan, it.commit(plan, StepResult(tokens))


def run(it: Scheduler) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while it.has_work:
        for output in step(it)[1]:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


def test_each_step_s_tokens_are_told_once_be_there_outputs_or_none() -> None:
    it = scheduler(max_num_batched_tokens=8)
    it.add(request("a", list(range(20)), max_tokens=2))
    told = []
    while it.has_work:
        step(it)
        told.append(it.stats().step_tokens)
    assert told == [8, 8, 4, 1]
    it.plan()  # nothing is left to do
    assert it.stats().step_tokens == 0


def test_an_image_that_no_step_may_divide_is_not_passed_by_for_ever() -> None:
    """By prompts that keep coming, whose answers leave each step too few tokens for it."""
    it = scheduler(max_num_batched_tokens=12, num_blocks=64, max_num_seqs=8)
    for number in range(6):
        it.add(request(f"first {number}", [1, 2], max_tokens=30))
    step(it)
    image = PromptImage(b"seen", 2, 8, (1, 1), ((1, 1),), bytes(3), is_whole=True)
    it.add(structs.replace(request("image", list(range(12)), max_tokens=1), images=(image,)))
    answered: list[str] = []
    for number in range(60):
        it.add(request(f"later {number}", [1, 2], max_tokens=6))
        answered += [output.request_id for output in step(it)[1]]
    assert "image" in answered


class Device:
    """Computes plans as ranks and driver do, from plans alone: what it reads are the tokens that steps have written.

    All groups of layers write into one memory, each into blocks of its own, and each reads no more than its window.
    """

    def __init__(self, block_size: int, windows: Windows) -> None:
        self.block_size = block_size
        self.windows = windows
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}  # (block, offset): (group, token)
        self.tables: dict[int, list[list[int]]] = {}  # of each slot, by group
        self.last: Counter[int] = Counter()  # of each slot, 0 at first

    def run(self, plan: StepPlan, brings_nothing: frozenset[int] = frozenset()) -> StepResult:
        """All of a step's tokens are written before any is read. brings_nothing: places without a token."""
        for at in plan.scheduled:
            self.write(at)
        return StepResult(
            [
                self.sample(at) if at.wants == "token" and place not in brings_nothing else []
                for place, at in enumerate(plan.scheduled)
            ]
        )

    def write(self, at: ScheduledSequence) -> None:
        tables = self.tables.setdefault(at.slot, [[] for _ in self.windows])
        assert len(at.tokens) == at.end - at.start
        for group, (table, new) in enumerate(zip(tables, at.new_blocks, strict=True)):
            if at.is_new:
                table.clear()
            assert at.first_new_block == len(table)
            table += new
            for position, token in enumerate(at.tokens, start=at.start):
                known = token if token >= 0 else self.last[last_token_of(token)]
                self.cache[table[position // self.block_size], position % self.block_size] = (group, known)

    def read(self, at: ScheduledSequence) -> list[int]:
        """The tokens up to the end, as the groups without a window see them; the others see the same ones."""
        tables = self.tables[at.slot]
        whole = self.windows.index(None)
        tokens = [self.cache[self.place(tables[whole], i)] for i in range(at.end)]
        for group, window in enumerate(self.windows):
            begin = 0 if window is None else max(0, at.start - window + 1)
            seen = [self.cache[self.place(tables[group], i)] for i in range(begin, at.end)]
            assert seen == [(group, token) for _, token in tokens[begin:]]
        return [token for _, token in tokens]

    def place(self, table: list[int], position: int) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size

    def sample(self, at: ScheduledSequence) -> list[int]:
        """The token behind the known ones and, as long as drafts are right, those behind them."""
        read = self.read(at)
        known = at.end - at.num_drafts
        tokens = [next_token(read[:known])]
        while known < at.end and read[known] == tokens[-1]:
            known += 1
            tokens.append(next_token(read[:known]))
        self.last[at.slot] = tokens[-1]
        return tokens


class Traffic(RuleBasedStateMachine):
    """Adds, aborts, plans, commits and resets in any order; the invariants hold after each.

    Up to three steps are under way at once; results bring no token, one or several.
    """

    block_size = 2
    max_model_len = 24
    num_blocks = 12
    windows: Windows = (None,)
    policy: Policy = "fcfs"
    owners: tuple[str, ...] = ("",)

    def __init__(self) -> None:
        super().__init__()
        self.it = scheduler(
            num_blocks=self.num_blocks,
            block_size=2,
            max_model_len=24,
            max_num_seqs=4,
            max_num_batched_tokens=7,
            max_prompt_logits=3,
            windows=self.windows,
            policy=self.policy,
            shared_tokens=3,
            tells_kv_events=True,
        )
        self.index = KVIndex()
        self.device = Device(self.block_size, self.windows)
        self.under_way: deque[StepPlan] = deque()
        self.live: dict[str, AddRequest] = {}
        self.not_ready: set[str] = set()
        self.tokens: dict[str, list[int]] = {}
        self.ends: Counter[str] = Counter()
        self.num_added = 0

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=23),
        max_tokens=st.integers(1, 12),
        stops=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        is_ready=st.sampled_from([True, True, True, False]),
        priority=st.integers(-1, 1),
    )
    def add(
        self,
        tokens: list[int],
        max_tokens: int,
        stops: bool,
        prompt_logprobs: int | None,
        is_ready: bool,
        priority: int,
    ) -> None:
        name = f"r{self.num_added}"
        self.num_added += 1
        stop_ids = (STOP,) if stops else ()
        it = request(name, tokens, max_tokens=max_tokens, stop_token_ids=stop_ids, prompt_logprobs=prompt_logprobs)
        it = structs.replace(it, priority=priority, owner=self.owners[self.num_added % len(self.owners)])
        assert self.it.add(it, is_ready=is_ready) is None
        self.live[name] = it
        self.tokens[name] = []
        if not is_ready:
            self.not_ready.add(name)

    @precondition(lambda self: self.not_ready)
    @rule()
    def set_ready(self) -> None:
        self.it.set_ready(self.not_ready.pop())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.live)), max_size=2))
        self.it.abort([*names, "unknown"])
        for name in names:
            self.live.pop(name, None)
            self.not_ready.discard(name)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.it.reset_prefix_cache()

    @precondition(lambda self: self.it.running)
    @rule(data=st.data(), right=st.integers(0, 3), wrong=st.integers(0, 2))
    def guess(self, data: st.DataObject, right: int, wrong: int) -> None:
        """Somebody proposes drafts behind a sequence's known tokens."""
        sequence = data.draw(st.sampled_from(self.it.running))
        drafts: list[int] = []
        for _ in range(right):
            drafts.append(next_token(sequence.token_ids + drafts))
        sequence.drafts = [*drafts, *[12] * wrong]

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 12), ahead=st.integers(0, 2))
    def steps(self, count: int, ahead: int) -> None:
        """With so many steps under way when a result is committed."""
        for _ in range(count):
            while len(self.under_way) <= ahead and self.plan():
                pass
            if self.under_way:
                self.commit()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def bring_nothing(self, data: st.DataObject) -> None:
        """A step that samples for some sequences only."""
        places = st.sampled_from(range(len(self.under_way[0].scheduled)))
        self.commit(data.draw(st.frozensets(places)))

    @precondition(lambda self: self.under_way)
    @rule()
    def extend(self) -> None:
        """The last step has not begun, and takes what has come since."""
        before = self.under_way.pop()
        after = self.it.extend(before)
        assert after.scheduled[: len(before.scheduled)] == before.scheduled
        self.check_plan(after, len(before.scheduled))
        self.under_way.append(after)

    def plan(self) -> bool:
        lengths = {sequence.request_id: sequence.num_planned for sequence in self.it.running}
        plan = self.it.plan()
        for at in plan.scheduled:
            assert at.is_new or lengths[at.sequence.request_id] == at.start
        if not plan.scheduled:
            assert self.under_way or not self.it.has_work, "a step must advance something"
            return False
        self.check_plan(plan)
        self.under_way.append(plan)
        return True

    def check_plan(self, plan: StepPlan, begin: int = 0) -> None:
        scheduled = plan.scheduled
        assert plan.num_tokens == sum(at.end - at.start for at in scheduled) <= 7
        lists = [at for at in scheduled if at.sequence.params.prompt_logprobs is not None]
        assert sum(min(at.end, at.sequence.num_prompt - 1) - at.first_logit for at in lists if self.lists(at)) <= 3
        if plan.num_tokens == len(scheduled):  # or a GPU would read these blocks while another sequence writes them
            held = Counter(block for at in scheduled for table in at.sequence.blocks.held() for block in table)
            running = [at for at in scheduled if at.sequence.slot >= 0]
            written = [table[at.start // 2] for at in running for table in at.sequence.blocks.tables]
            assert all(held[block] == 1 for block in written)
        for at in scheduled[begin:]:
            sequence = at.sequence
            assert at.sequence.request_id not in self.not_ready
            assert at.start < at.end
            assert sequence.num_planned == at.end - at.num_drafts <= sequence.length
            assert sequence.num_planned < self.max_model_len
            assert len(sequence.blocks) >= -(-at.end // 2)
            assert (at.wants == "token") == (at.end - at.num_drafts == sequence.num_prompt + at.num_outputs)
            for window, table in zip(self.windows, sequence.blocks.held(), strict=True):
                if window is not None and at.new_blocks[0] and not at.is_new:  # given back when a table grows
                    assert len(table) <= -(-(window - 1 + at.end - at.start + 2) // 2) + 1  # two steps are under way
        self.check_pool()

    def check_pool(self) -> None:
        self.it.pool.check([table for sequence in self.it.running for table in sequence.blocks.held()])

    def lists(self, at: ScheduledSequence) -> bool:
        return min(at.end, at.sequence.num_prompt - 1) > at.first_logit

    def commit(self, brings_nothing: frozenset[int] = frozenset()) -> None:
        plan = self.under_way.popleft()
        result = self.device.run(plan, brings_nothing)
        for place, at in enumerate(plan.scheduled):
            if at.sequence.params.prompt_logprobs is not None and self.lists(at):
                result.prompt_logprobs[place] = [None] * (min(at.end, at.sequence.num_prompt - 1) - at.first_logit)
        for output in self.it.commit(plan, result):
            self.receive(output)

    def receive(self, output: TokenOutput) -> None:
        it = self.live[output.request_id]
        mine = self.tokens[output.request_id]
        assert output.token_ids
        if not mine and it.params.prompt_logprobs is not None:
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(it.token_ids)
            assert output.num_cached_tokens == 0
        for token in output.token_ids:
            assert token == next_token(it.token_ids + mine)
            assert not (mine and mine[-1] in it.params.stop_token_ids), "a token behind the end"
            mine.append(token)
        length = len(it.token_ids) + len(mine)
        assert len(mine) <= it.params.max_tokens
        assert length <= self.max_model_len
        if output.finish_reason is not None:
            self.ends[output.request_id] += 1
            del self.live[output.request_id]
            if output.finish_reason == "stop":
                assert mine[-1] in it.params.stop_token_ids
            else:
                assert output.finish_reason == "length"
                assert len(mine) == it.params.max_tokens or length == self.max_model_len

    @invariant()
    def who_listens_knows_the_prefix_cache(self) -> None:
        payload = msgpack.encode(KVEventBatch(0.0, self.it.take_kv_events(), 0))
        self.index.apply(vllm_kv_events.decode(payload))
        names = {(group_of(name), int.from_bytes(name[24:32], "big")) for name in self.it.pool._block_of}
        assert self.index.blocks == names

    @invariant()
    def books_are_right(self) -> None:
        self.check_pool()
        running, waiting = self.it.running, list(self.it.waiting.values())
        slots = [sequence.slot for sequence in running]
        assert len(set(slots)) == len(slots) <= 4
        assert min(slots, default=0) >= 0
        assert all(sequence.slot == -1 and not sequence.blocks for sequence in waiting)
        shared = len(self.owners) > 1
        for sequences in (waiting,) if shared else (running, waiting):  # those that run are put in order in each plan
            ranked = self.policy == "priority"
            order = [
                (self.live[it.request_id].priority if ranked else 0, it.tag if shared else 0.0, it.number)
                for it in sequences
            ]
            assert order == sorted(order), "first come, first served, of equals"
        assert {sequence.request_id for sequence in running + waiting} == set(self.live)

    def teardown(self) -> None:
        for name in self.not_ready:
            self.it.set_ready(name)
        self.not_ready.clear()
        for _ in range(10_000):
            if not self.it.has_work and not self.under_way:
                break
            while len(self.under_way) < 2 and self.plan():
                pass
            self.commit()
        assert not self.live
        assert set(self.ends.values()) <= {1}
        assert self.it.pool.num_free == self.num_blocks
        self.it.pool.check([])


class WindowTraffic(Traffic):
    """The same where most layers have a window, of another length than a block's multiple."""

    num_blocks = 26
    windows = (None, 3, 5)


class PriorityTraffic(Traffic):
    """Lower ones go first, and give way last."""

    policy = "priority"


class CachedTraffic(Traffic):
    """Those with the longest cached prefix go first."""

    policy = "lpm"


class SharedTraffic(Traffic):
    """Requests of several owners, who give way to each other."""

    owners = ("a", "a", "a", "b", "c")


TestSharedTraffic = SharedTraffic.TestCase
TestSharedTraffic.settings = settings(stateful_step_count=60)
TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(stateful_step_count=60)
TestWindowTraffic = WindowTraffic.TestCase
TestWindowTraffic.settings = settings(stateful_step_count=60)
TestPriorityTraffic = PriorityTraffic.TestCase
TestPriorityTraffic.settings = settings(stateful_step_count=60)
TestCachedTraffic = CachedTraffic.TestCase
TestCachedTraffic.settings = settings(stateful_step_count=60)


def test_decodes_come_first_then_prompts_in_chunks() -> None:
    it = scheduler(max_num_batched_tokens=10)
    it.add(request("a", list(range(4)), max_tokens=9))
    step(it)
    it.add(request("b", list(range(10, 40)), max_tokens=9))
    sizes = []
    for _ in range(4):
        plan, _ = step(it)
        sizes.append([(at.sequence.request_id, at.end - at.start) for at in plan.scheduled])
    assert sizes[:3] == [[("a", 1), ("b", 9)]] * 3
    assert sizes[3] == [("a", 1), ("b", 3)]


def test_a_prefix_is_computed_once_and_its_last_token_always() -> None:
    it = scheduler()
    prompt = list(range(8))
    it.add(request("a", prompt, max_tokens=1))
    run(it)
    it.add(request("b", prompt, max_tokens=1))
    plan, outputs = step(it)
    assert [(at.start, at.end) for at in plan.scheduled] == [(4, 8)]
    assert outputs[0].num_cached_tokens == 4
    stats = it.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (16, 4)


def test_requests_of_one_step_share_their_prompt() -> None:
    it = scheduler()
    for name in ("a", "b", "c"):
        it.add(request(name, list(range(10)), max_tokens=1))
    plan, _ = step(it)
    assert [(at.start, at.end) for at in plan.scheduled] == [(0, 10), (8, 10), (8, 10)]


def test_a_block_that_one_token_fills_is_shared_from_the_next_step_on() -> None:
    """On a GPU a step of single tokens attends while it writes: its readers would meet its writer."""
    it = scheduler(max_num_batched_tokens=7)
    it.add(request("a", [0, 1, 2, 3, 4, 5, 6], max_tokens=4))
    step(it)
    tokens = it.running[0].token_ids[:8]
    it.add(request("b", [*tokens, 9], max_tokens=1))
    plan, _ = step(it)
    assert [(at.sequence.request_id, at.start, at.end) for at in plan.scheduled] == [("a", 7, 8), ("b", 4, 9)]
    it.add(request("c", [*tokens, 8], max_tokens=1))
    plan, _ = step(it)
    assert [(at.sequence.request_id, at.start, at.end) for at in plan.scheduled] == [("a", 8, 9), ("c", 8, 9)]
    assert plan.scheduled[1].sequence.num_cached == 8


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
    assert [(at.start, at.end) for at in plan.scheduled] == [(0, 10), (0, 10)]


def test_a_reset_forgets_what_nobody_holds() -> None:
    it = scheduler()
    it.add(request("a", list(range(8)), max_tokens=1))
    run(it)
    it.reset_prefix_cache()
    it.add(request("b", list(range(8)), max_tokens=1))
    plan, _ = step(it)
    assert plan.scheduled[0].start == 0


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
    outputs = it.commit(plan, StepResult([[0], [0]], errors={0: "NaN"}))
    assert [(o.request_id, o.error, o.finish_reason) for o in outputs] == [("a", "NaN", "error"), ("b", None, None)]
    it.abort(["b"])
    it.pool.check([])
    it.add(request("c", [ord("a")] * 9))
    it.add(request("d", [ord("b")] * 9))
    assert [at.start for at in it.plan().scheduled] == [0, 8]


def test_the_first_output_brings_the_times() -> None:
    ticks = iter(range(100, 200))
    it = Scheduler(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32), clock=lambda: float(next(ticks)))
    it.add(request("a", [1, 2, 3]))
    _, (first,) = step(it)
    _, (second,) = step(it)
    assert (first.scheduled_time, first.first_token_time) == (100.0, 101.0)
    assert (second.scheduled_time, second.first_token_time, second.num_cached_tokens) == (None, None, None)


def test_a_step_goes_on_from_a_token_that_another_is_still_sampling() -> None:
    it = scheduler()
    it.add(request("a", [1, 2, 3], max_tokens=3))
    first = it.plan()
    second = it.plan()
    (at,) = second.scheduled
    assert (at.start, at.end, at.tokens, at.num_outputs) == (3, 4, [last_token_of(at.slot)], 1)
    (output,) = it.commit(first, StepResult([[5]]))
    assert output.token_ids == [5]
    (output,) = it.commit(second, StepResult([[6]]))
    assert output.token_ids == [6]
    assert it.running[0].token_ids == [1, 2, 3, 5, 6]


def test_nothing_is_planned_behind_the_last_token_that_may_come() -> None:
    for limits, params in (({}, {"max_tokens": 1}), ({"max_model_len": 4}, {"max_tokens": 9})):
        it = scheduler(**limits)
        it.add(request("a", [1, 2, 3], **params))
        first = it.plan()
        assert not it.plan().scheduled
        (output,) = it.commit(first, StepResult([[5]]))
        assert output.finish_reason == "length"


def test_what_a_step_computes_behind_a_stop_token_is_dropped() -> None:
    it = scheduler()
    it.add(request("a", [1, 2, 3], stop_token_ids=(5,)))
    first = it.plan()
    second = it.plan()
    (output,) = it.commit(first, StepResult([[5]]))
    assert output.finish_reason == "stop"
    assert not it.has_work
    it.add(request("a", [1, 2, 3]))  # the same id again is another request
    assert it.commit(second, StepResult([[6]])) == []
    assert it.waiting["a"].token_ids == [1, 2, 3]


def test_a_preempted_sequence_waits_for_the_steps_that_compute_it() -> None:
    it = scheduler(num_blocks=5)
    it.add(request("a", [1] * 7, max_tokens=6))
    it.add(request("b", [2] * 7, max_tokens=6))
    first = it.plan()
    second = it.plan()
    third = it.plan()  # both want a third block, and there is one
    assert [at.sequence.request_id for at in third.scheduled] == ["a"]
    assert it.waiting["b"].num_steps == 2
    it.abort(["a"])
    assert not it.plan().scheduled, "its tokens are not known yet"
    it.commit(first, StepResult([[3], [4]]))
    it.commit(second, StepResult([[3], [5]]))
    (at,) = it.plan().scheduled
    assert at.tokens == [2, 2, 2, 4, 5]
    assert at.start == 4, "the prompt's block was remembered"
    it.commit(third, StepResult([[9]]))


@pytest.mark.parametrize(("num_right", "num_cached"), [(0, 4), (2, 4), (3, 8), (5, 8), (7, 12)])
def test_the_prefix_cache_is_offered_what_is_right_of_drafts(num_right: int, num_cached: int) -> None:
    it = scheduler()
    it.add(request("a", [0, 1, 2, 3], max_tokens=40))
    step(it)
    sequence = it.running[0]
    drafts: list[int] = []
    for _ in range(7):
        drafts.append(next_token(sequence.token_ids + drafts))
    sequence.drafts = [*drafts[:num_right], *[12] * (7 - num_right)]
    plan = it.plan()
    (at,) = plan.scheduled
    assert (at.start, at.end, at.num_drafts, at.first_logit) == (4, 12, 7, 4)
    assert not it.plan().scheduled, "how far it got is not known yet"
    result = Device(4, (None,))
    (table,) = sequence.blocks.tables
    result.tables[at.slot] = [table[:1]]
    result.cache = {(table[0], offset): (0, offset) for offset in range(4)}
    (output,) = it.commit(plan, result.run(plan))
    assert output.token_ids == [*drafts[:num_right], next_token(sequence.token_ids[: 5 + num_right])]
    known = sequence.token_ids[:5] + sequence.drafts
    it.add(request("right", [*sequence.token_ids, 12], max_tokens=1))
    it.add(request("wrong", [*known[:5], *[12] * 8], max_tokens=1))
    scheduled = {at.sequence.request_id: at for at in it.plan().scheduled}
    assert scheduled["right"].start == num_cached
    assert scheduled["wrong"].start == 4


def running_pair(**limits: object) -> tuple[Scheduler, Sequence, Sequence]:
    """Two sequences that have begun, each with 4 tokens, the last one not computed."""
    it = scheduler(**limits)
    for name in ("a", "b"):
        assert it.add(request(name, [1, 2, 3], max_tokens=10)) is None
    step(it)
    first, second = it.running
    return it, first, second


def test_drafts_take_no_token_of_those_behind() -> None:
    it, first, _ = running_pair(max_num_batched_tokens=6)
    first.drafts = [12] * 9
    assert [(at.sequence.request_id, at.num_drafts) for at in it.plan().scheduled] == [("a", 4), ("b", 0)]
    it, first, second = running_pair(max_drafts=3)
    first.drafts = [12] * 2
    second.drafts = [12] * 2
    assert [at.num_drafts for at in it.plan().scheduled] == [2, 1]


def test_drafts_take_no_block_of_those_behind() -> None:
    it, first, second = running_pair(num_blocks=4)  # each has one, full with its newest token
    for _ in range(3):
        first.drafts = [12] * 9
        plan, _ = step(it)
        assert len(plan.scheduled) == 2, "nobody gives way"
        assert plan.scheduled[0].num_drafts
    assert len(first.blocks) + len(second.blocks) <= 4


@pytest.mark.parametrize(
    ("drafts", "tokens", "num_right"),
    [
        ([5, 6, 7], [5, 6, 7, 8], 3),
        ([5, 6, 7], [5, 9, 7, 8], 1),  # what a grammar forces behind a draft that was wrong
        ([5, 6, 7], [5, 6], 1),  # a run that ended early: the last token is computed again, for its logits
        ([5, 6], [5, 6, 7, 8, 9], 2),
        ([5, 6], [9], 0),
    ],
)
def test_what_drafts_have_left_in_the_cache_is_what_was_right(
    drafts: list[int], tokens: list[int], num_right: int
) -> None:
    it, first, _ = running_pair()
    first.drafts = drafts
    plan = it.plan()
    it.commit(plan, StepResult([tokens, [1]]))
    assert first.token_ids == [1, 2, 3, first.token_ids[3], *tokens]
    assert first.num_planned == 4 + num_right
    (at,) = [at for at in it.plan().scheduled if at.sequence is first]
    assert at.tokens == tokens[num_right:]


def test_a_sequence_that_is_not_ready_is_passed_over() -> None:
    it = scheduler()
    it.add(request("a", [1, 2, 3]), is_ready=False)
    assert not it.has_work
    assert not it.plan().scheduled
    it.add(request("b", [4, 5, 6]))
    plan, _ = step(it)
    assert [at.sequence.request_id for at in plan.scheduled] == ["b"]
    it.set_ready("a")
    plan, _ = step(it)
    assert [at.sequence.request_id for at in plan.scheduled] == ["b", "a"]
    assert [sequence.request_id for sequence in it.running] == ["a", "b"], "who came last gives way first"


def admitted(it: Scheduler) -> list[str]:
    """Who is admitted, one after the other, where one may run at a time."""
    order: list[str] = []
    while it.has_work:
        plan, _ = step(it)
        order += [at.sequence.request_id for at in plan.scheduled if at.is_new]
    return order


def ranked(name: str, priority: int, arrival_time: float) -> AddRequest:
    return structs.replace(request(name, [1, 2]), priority=priority, arrival_time=arrival_time)


def test_lower_priorities_go_first_and_equals_as_they_came() -> None:
    it = scheduler(max_num_seqs=1, policy="priority")
    for number, priority in enumerate((0, 5, -3, 5, 0)):
        it.add(ranked(f"{priority}/{number}", priority, number))
    assert admitted(it) == ["-3/2", "0/0", "0/4", "5/1", "5/3"]


def test_waiting_makes_up_for_priority_where_it_ages() -> None:
    """Ten seconds weigh as much as one step: 3 that came 31 seconds before 0 goes before it, and 29 are too few."""
    it = scheduler(max_num_seqs=1, policy="priority", priority_aging=10.0)
    for name, priority, came in (("first", 0, 0.0), ("old", 3, 69.0), ("older", 3, 71.0), ("new", 0, 100.0)):
        it.add(ranked(name, priority, came))
    assert admitted(it) == ["first", "old", "new", "older"]


def test_priorities_count_for_nothing_under_another_policy() -> None:
    it = scheduler(max_num_seqs=1)
    for number, priority in enumerate((5, -3)):
        it.add(ranked(f"{priority}", priority, number))
    assert admitted(it) == ["5", "-3"]


def test_the_longest_cached_prefix_goes_first() -> None:
    it = scheduler(max_num_seqs=1, policy="lpm", num_blocks=32)
    it.add(request("seen", list(range(20))))
    run(it)
    it.add(request("new", list(range(40, 60))))
    it.add(request("half", [*range(8), *range(60, 72)]))
    it.add(request("whole", list(range(20))))
    it.add(request("new too", list(range(80, 100))))
    assert admitted(it) == ["whole", "half", "new", "new too"]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "lpm"])
@pytest.mark.parametrize("owners", ["a", "ab"])
def test_what_another_engine_has_begun_goes_before_all_that_wait(policy: str, owners: str) -> None:
    """Its owner's own requests and others', be their prompts cached; and of what was begun, the first to come."""
    it = scheduler(max_num_seqs=1, policy=policy, num_blocks=32)
    for number in range(6):
        it.add(structs.replace(request(f"new {number}", list(range(20))), owner=owners[number % len(owners)]))
    step(it)
    for name in ("begun", "begun too"):
        it.add(structs.replace(request(name, list(range(60, 80))), num_prompt=18, owner="a"))
    assert admitted(it)[:3] == ["begun", "begun too", "new 1"]


def test_a_step_that_brings_no_token_is_planned_again() -> None:
    it = scheduler()
    it.add(request("a", [1, 2, 3, 4]))
    first = it.plan()
    second = it.plan()
    assert it.commit(first, StepResult([[]])) == []
    third = it.plan()
    assert [(at.start, at.tokens) for at in third.scheduled] == [(3, [4])]
    assert it.commit(second, StepResult([[9]])) == [], "it went on from a token that never came"
    (output,) = it.commit(third, StepResult([[5]]))
    assert output.token_ids == [5]
