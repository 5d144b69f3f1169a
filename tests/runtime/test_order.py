"""Orders: what a rank makes of them is what the scheduler holds."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.parallel.order import StepOrder, largest_order, make_order
from octavo.runtime.scheduling.kv_groups import Windows
from octavo.runtime.scheduling.plan import SchedulerConfig, StepResult, last_token_of
from octavo.runtime.scheduling.scheduler import Scheduler
from octavo.runtime.worker.step_inputs import InputBuilder, with_tokens

CONFIG = SchedulerConfig(num_blocks=14, block_size=4, max_model_len=32, max_num_seqs=4, max_num_batched_tokens=11)


@pytest.mark.parametrize("windows", [(None,), (None, 5, 2)], ids=["one group", "windows"])
@pytest.mark.parametrize("seed", range(20))
def test_inputs_lead_to_the_blocks_that_sequences_hold(seed: int, windows: Windows) -> None:
    """Through bytes, as a follower gets them, while sequences come, go and are preempted."""
    rng = random.Random(seed)
    config = replace(CONFIG, windows=windows, num_blocks=CONFIG.num_blocks * len(windows))
    scheduler = Scheduler(config)
    builder = InputBuilder(config)
    last = np.zeros(CONFIG.max_num_seqs, np.int32)
    most = largest_order(config)
    for number in range(60):
        if rng.random() < 0.4:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
            scheduler.add(AddRequest(f"r{number}", prompt, SamplingParams(max_tokens=rng.randrange(1, 12)), 0.0))
        if not scheduler.has_work:
            continue
        plan = scheduler.plan()
        held = [deepcopy(at.sequence.blocks) for at in plan.scheduled]
        order = StepOrder(np.frombuffer(make_order(plan, number).buffer.tobytes(), np.int32).copy())
        assert len(order.buffer) <= most
        assert order.number == number
        inputs = with_tokens(builder.build(order), order)
        assert inputs.seq_lens.tolist() == [at.end for at in plan.scheduled]
        assert inputs.token_ids.tolist() == [token for at in plan.scheduled for token in at.tokens]
        for group, of_group in enumerate(inputs.by_group()):
            rows = iter(zip(inputs.positions.tolist(), of_group.slot_mapping.tolist(), strict=True))
            for place, (at, blocks) in enumerate(zip(plan.scheduled, held, strict=True)):
                table = blocks.tables[group]
                begin = blocks.begins[group]
                assert of_group.block_tables[place, begin : len(table)].tolist() == table[begin:]
                for position in range(at.start, at.end):
                    assert next(rows) == (position, table[position // 4] * 4 + position % 4)
            assert next(rows, None) is None
        starts = inputs.query_starts.tolist()
        assert inputs.logits_index.tolist() == [
            starts[place] + position - at.start
            for place, at in enumerate(plan.scheduled)
            for position in range(at.first_logit, at.end)
        ]
        last[[at.slot for at in plan.scheduled]] = 1
        scheduler.commit(plan, StepResult([[1] if at.wants == "token" else [] for at in plan.scheduled]))


def wants(*requests: AddRequest) -> list[str]:
    """Of the steps in which these are answered with a token each, the prompts in chunks."""
    scheduler = Scheduler(replace(CONFIG, max_num_batched_tokens=4))
    for request in requests:
        scheduler.add(request)
    found = []
    while scheduler.has_work:
        plan = scheduler.plan()
        found.append(make_order(plan, 0).wants)
        scheduler.commit(plan, StepResult([[1] if at.wants == "token" else [] for at in plan.scheduled]))
    return found


def test_an_order_wants_no_more_of_the_logits_than_its_sequences_do() -> None:
    greedy = AddRequest("a", [1] * 6, SamplingParams(max_tokens=1, temperature=0.0), 0.0)
    drawn = AddRequest("b", [2], SamplingParams(max_tokens=1, temperature=1.0), 0.0)
    listed = AddRequest("c", [3], SamplingParams(max_tokens=1, temperature=0.0, logprobs=1), 0.0)
    listed_prompt = AddRequest("d", [4] * 6, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1), 0.0)
    assert wants(greedy) == ["nothing", "best"]
    assert wants(greedy, drawn) == ["nothing", "logits"]
    assert wants(greedy, listed) == ["nothing", "logits"]
    assert wants(listed_prompt) == ["logits", "logits"]


def test_tokens_that_are_being_sampled_are_put_in_by_slot() -> None:
    scheduler = Scheduler(CONFIG)
    for name in ("a", "b"):
        scheduler.add(AddRequest(name, [3, 4], SamplingParams(max_tokens=4), 0.0))
    scheduler.plan()
    plan = scheduler.plan()
    order = make_order(plan, 1)
    slots = [at.slot for at in plan.scheduled]
    assert order.token_ids.tolist() == [last_token_of(slot) for slot in slots]
    order.fill_tokens(np.arange(50, 54, dtype=np.int32))
    assert order.token_ids.tolist() == [50 + slot for slot in slots]
