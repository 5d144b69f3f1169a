"""Steps of several stages at once: what the scheduler plans for them, and how layers and their caches are divided."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.parallel.layout import Sizes, even_stages
from octavo.runtime.scheduling.plan import SchedulerConfig, StepPlan, StepResult
from octavo.runtime.scheduling.scheduler import Scheduler
from octavo.runtime.worker.kv_layout import choose_layout


def continued(prompt: list[int], count: int) -> list[int]:
    """A prompt and what the model of these tests says behind it: each token depends on all before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum((place + 1) * token for place, token in enumerate(tokens)) % 7)
    return tokens


def result_of(plan: StepPlan, truth: dict[str, list[int]]) -> StepResult:
    return StepResult([[truth[at.sequence.request_id][at.end]] if at.wants == "token" else [] for at in plan.scheduled])


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("seed", range(12))
def test_steps_under_way_wait_for_none_of_their_tokens(stages: int, seed: int) -> None:
    """With chunks, shared prefixes, preemption and aborts; answers are those of one step after the other."""
    rng = random.Random(seed)
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=14,
            block_size=4,
            max_model_len=40,
            max_num_seqs=rng.randrange(2, 9),
            max_num_batched_tokens=rng.choice([3, 8, 30]),
            stages=stages,
        )
    )
    stem = [rng.randrange(7) for _ in range(20)]
    truth: dict[str, list[int]] = {}
    outputs: dict[str, list[int]] = {}
    aborted: set[str] = set()
    under_way: deque[StepPlan] = deque()
    most_under_way = 0
    while len(truth) < 12 or scheduler.has_work or under_way:
        if len(truth) < 12 and rng.random() < 0.5:
            name = f"r{len(truth)}"
            prompt = [*stem[: rng.randrange(20)], rng.randrange(7)]
            count = rng.randrange(1, 16)
            truth[name] = continued(prompt, count + 1)
            outputs[name] = []
            assert scheduler.add(AddRequest(name, prompt, SamplingParams(max_tokens=count), 0.0)) is None
        if rng.random() < 0.05 and truth:
            name = rng.choice(sorted(truth))
            scheduler.abort([name])
            aborted.add(name)
        while len(under_way) < stages and (plan := scheduler.plan()).scheduled:
            sampling = {id(at.sequence) for each in under_way for at in each.scheduled if at.wants == "token"}
            for at in plan.scheduled:
                assert at.tokens == truth[at.sequence.request_id][at.start : at.end], "known, all of them"
                assert id(at.sequence) not in sampling or at.sequence.num_preemptions
            under_way.append(plan)
        most_under_way = max(most_under_way, len(under_way))
        if under_way:
            plan = under_way.popleft()
            for output in scheduler.commit(plan, result_of(plan, truth)):
                outputs[output.request_id] += output.token_ids
    for name, tokens in outputs.items():
        expected = truth[name][-len(tokens) - 1 : -1] if name not in aborted else tokens
        assert tokens == expected, name
    assert most_under_way > 1
    scheduler.pool.check([])


@pytest.mark.parametrize(
    ("stages", "sizes"), [(1, [9, 9, 9, 9]), (2, [5, 4, 5, 4]), (3, [3, 3, 3, 3]), (4, [3, 3, 3, 0])]
)
def test_steps_share_the_sequences_that_lack_a_token(stages: int, sizes: list[int]) -> None:
    """Nine sequences: a stage would have nothing to do while all of them are in one step."""
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_model_len=40, stages=stages))
    truth = {f"r{i}": continued([i], 10) for i in range(9)}
    for name, tokens in truth.items():
        scheduler.add(AddRequest(name, tokens[:1], SamplingParams(max_tokens=8), 0.0))
    prompts = scheduler.plan()
    assert not stages > 1 or not scheduler.plan().scheduled, "all of them are being sampled"
    scheduler.commit(prompts, result_of(prompts, truth))
    under_way: deque[StepPlan] = deque()
    found = []
    for _ in sizes:
        if len(under_way) == stages:
            done = under_way.popleft()
            scheduler.commit(done, result_of(done, truth))
        under_way.append(scheduler.plan())
        found.append(len(under_way[-1].scheduled))
    assert found == sizes


@given(layers=st.lists(st.integers(1, 40), min_size=1, max_size=9), head=st.integers(0, 200), count=st.integers(1, 9))
def test_the_largest_stage_is_as_small_as_can_be(layers: list[int], head: int, count: int) -> None:
    count = min(count, len(layers))
    stages = even_stages(Sizes(tuple(layers), head), count)
    assert [begin for begin, _ in stages] == [0, *(stop for _, stop in stages[:-1])]
    assert stages[-1][1] == len(layers)
    assert all(begin < stop for begin, stop in stages)

    def least(begin: int, left: int) -> int:
        """Of all ways to divide the layers from `begin` on."""
        if left == 1:
            return sum(layers[begin:]) + head
        return min(
            max(sum(layers[begin:stop]), least(stop, left - 1)) for stop in range(begin + 1, len(layers) - left + 2)
        )

    sums = [sum(layers[begin:stop]) for begin, stop in stages]
    sums[-1] += head
    assert max(sums) == least(0, count)


def test_a_large_output_head_counts_as_layers() -> None:
    assert even_stages(Sizes((7,) * 30, 56), 2) == [(0, 19), (19, 30)]
    assert even_stages(Sizes((7,) * 30, 7 * 40), 3) == [(0, 28), (28, 29), (29, 30)]


@given(
    windows=st.lists(st.sampled_from([None, 8, 16]), min_size=2, max_size=30),
    edges=st.lists(st.integers(1, 29), max_size=3, unique=True),
)
def test_stages_have_the_same_groups_of_the_cache(windows: list[int | None], edges: list[int]) -> None:
    """Each layer in a group of its own window, and no group with more layers than it must."""
    whole = choose_layout(windows, 100)
    inner = sorted(edge for edge in edges if edge < len(windows))
    for begin, stop in zip([0, *inner], [*inner, len(windows)], strict=True):
        stage = whole.of_stage(begin, stop)
        assert stage.windows == whole.windows
        assert sorted(layer for group in stage.layers for layer in group) == list(range(stop - begin))
        for window, layers in zip(stage.windows, stage.layers, strict=True):
            assert whole.windows == (None,) or all(windows[begin + layer] == window for layer in layers)
            groups = whole.windows.count(window)
            own = sum(len(group) for group, w in zip(stage.layers, stage.windows, strict=True) if w == window)
            assert own // groups <= len(layers) <= -(-own // groups)
