"""Adapters in the engine: many of them over few slots, mixed batches, reloads, prefix caches, and those that fail."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from guessing import Guessing, Style
from hf_oracle import CASES, make_hf, save
from made_heads import of_eagle
from peft_oracle import PeftOracle
from toy_model import make_request, run_to_end, tokens_of

from octavo.quant.adapter_files import digest_of
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.launch import Launcher
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.messages import AddRequest, LoadAdapter, SamplingParams, TokenOutput
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.scheduling.adapter_slots import Adapter
from octavo.runtime.scheduling.plan import SchedulerConfig, StepResult
from octavo.runtime.scheduling.scheduler import Scheduler
from octavo.runtime.speculation.config import SpeculativeConfig
from octavo.runtime.speculation.model_speculation import ModelSpeculation
from octavo.runtime.startup import load_engine

VOCAB = 96
NUM_ADAPTERS = 5


class Adapted:
    """A tiny model, and adapters for it that PEFT has made, with PEFT's own greedy answers."""

    def __init__(self, directory: Path) -> None:
        self.base = make_hf(*CASES["qwen2"])
        self.directory = save(self.base, directory / "base")
        self.oracles = [
            PeftOracle(self.base, directory / f"adapter{i}", seed=i, r=2 + i, use_dora=i == 3)
            for i in range(NUM_ADAPTERS)
        ]
        self.digests = [digest_of(oracle.directory) for oracle in self.oracles]

    def engine(self, *, max_loras: int = 2, max_cpu_loras: int | None = None, **settings: Any) -> Engine:
        lora = LoraOptions(enable_lora=True, max_loras=max_loras, max_cpu_loras=max_cpu_loras)
        defaults = {"dtype": "float32", "block_size": 4, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 20}
        config = EngineConfig(model=str(self.directory), lora=lora, **(defaults | settings))
        return load_engine(config, time.time())[0]

    def message(self, number: int) -> LoadAdapter:
        return LoadAdapter(self.digests[number], str(self.oracles[number].directory), f"adapter{number}")

    def request(self, name: str, prompt: list[int], number: int | None, **params: Any) -> AddRequest:
        request = make_request(name, prompt, **params)
        return request if number is None else msgspec.structs.replace(request, adapter=self.digests[number])

    @torch.inference_mode()
    def greedy(self, prompt: list[int], number: int | None, count: int) -> list[int]:
        """PEFT's, of an adapter or of the base."""
        ids = list(prompt)
        for _ in range(count):
            if number is None:
                logits = self.base(torch.tensor([ids]), use_cache=False).logits[0]
            else:
                logits = self.oracles[number].logits(ids)
            ids.append(int(logits[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("adapted"))


def load(engine: Engine, *messages: LoadAdapter) -> dict[str, str]:
    """What became of each, by its digest."""
    told = {answer.digest: answer.error for message in messages if (answer := engine.load_adapter(message))}
    while len(told) < len(messages):
        answers, refused = engine.take_adapters()
        assert not refused
        told |= {answer.digest: answer.error for answer in answers}
        time.sleep(0.001)
    return told


def run(engine: Engine, requests: list[AddRequest]) -> dict[str, list[TokenOutput]]:
    """As the engine's process does it: what has been read is taken before each step."""
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        outputs[request.request_id] += engine.add(request)
    while engine.scheduler.waiting or engine.has_work:
        engine.take_fetched()
        _, refused = engine.take_adapters()
        for output in [*refused, *engine.step()]:
            outputs[output.request_id].append(output)
    return outputs


def prompts(count: int, seed: int = 0) -> Iterator[list[int]]:
    rng = random.Random(seed)
    return ([rng.randrange(3, VOCAB) for _ in range(rng.randrange(3, 14))] for _ in range(count))


def test_mixed_batches_say_what_peft_says(adapted: Adapted) -> None:
    engine = adapted.engine(max_loras=3)
    load(engine, *(adapted.message(i) for i in range(3)))
    numbers = [None, 0, 1, 2, 0, None, 2, 1]
    given = list(zip(prompts(len(numbers)), numbers, strict=True))
    outputs = run(engine, [adapted.request(str(i), prompt, number) for i, (prompt, number) in enumerate(given)])
    for i, (prompt, number) in enumerate(given):
        assert tokens_of(outputs[str(i)]) == adapted.greedy(prompt, number, 8), number


@pytest.mark.parametrize("style", ["right", "mixed"])
def test_drafts_are_checked_by_the_adapter_of_their_request(style: Style, adapted: Adapted) -> None:
    engine = adapted.engine(max_loras=3)
    load(engine, *(adapted.message(i) for i in range(3)))
    numbers = [None, 0, 1, 2, 0]
    given = list(zip(prompts(len(numbers), seed=7), numbers, strict=True))
    said = {str(i): adapted.greedy(prompt, number, 20) for i, (prompt, number) in enumerate(given)}
    texts = {name: given[int(name)][0] + tokens for name, tokens in said.items()}
    engine.speculation = Guessing(texts, style, VOCAB).speculation(4)
    outputs = run(
        engine, [adapted.request(str(i), prompt, number, max_tokens=20) for i, (prompt, number) in enumerate(given)]
    )
    assert {name: tokens_of(told) for name, told in outputs.items()} == said
    stats = engine.scheduler.stats()
    right = sum(stats.accepted_per_pos)
    assert right == stats.num_draft_tokens > 40 if style == "right" else 0 < right < stats.num_draft_tokens


def test_a_head_reads_along_whatever_adapter_there_is(adapted: Adapted, tmp_path: Path) -> None:
    """Of a model some of whose layers have windows, with block tables of their own, and some none."""
    head = SpeculativeConfig("eagle3", 3, model=str(of_eagle().write(tmp_path)))
    engine = adapted.engine(max_loras=3, speculative_config=head)
    assert isinstance(engine.speculation, ModelSpeculation)
    engine.speculation = ModelSpeculation(engine.speculation._model, lambda _: 3, 3)
    load(engine, *(adapted.message(i) for i in range(3)))
    numbers = [None, 0, 1, 2, 0]
    given = list(zip(prompts(len(numbers), seed=7), numbers, strict=True))
    wanted = [adapted.request(str(i), prompt, number, max_tokens=20) for i, (prompt, number) in enumerate(given)]
    outputs = run(engine, wanted)
    for i, (prompt, number) in enumerate(given):
        assert tokens_of(outputs[str(i)]) == adapted.greedy(prompt, number, 20), number
    assert engine.scheduler.stats().num_draft_tokens > 40


@pytest.mark.parametrize("in_memory", [None, 4])
def test_many_adapters_take_turns(in_memory: int | None, adapted: Adapted) -> None:
    """Five over two slots; with as many in memory they are read again and again, and nobody waits for ever."""
    engine = adapted.engine(max_cpu_loras=in_memory)
    load(engine, *(adapted.message(i) for i in range(NUM_ADAPTERS)))
    count = 60
    rng = random.Random(count)
    known = {number: adapted.greedy([5, 6, 7], number, 4) for number in (None, *range(NUM_ADAPTERS))}
    numbers = [rng.choice(list(known)) for _ in range(count)]
    outputs = run(engine, [adapted.request(str(i), [5, 6, 7], it, max_tokens=4) for i, it in enumerate(numbers)])
    assert all(tokens_of(outputs[str(i)]) == known[number] for i, number in enumerate(numbers))
    assert engine.adapters is not None
    entries = engine.adapters._entries.values()
    assert sum(entry.loaded is not None for entry in entries) <= (in_memory or 2)


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [100, 8])
def test_a_hundred_adapters_over_four_slots(in_memory: int, adapted: Adapted, tmp_path: Path) -> None:
    """A thousand requests of all of them, which come faster than they are answered: answers are PEFT's, and nobody is
    passed over by more than those of other adapters that wait as long.
    """
    oracles = [PeftOracle(adapted.base, tmp_path / str(seed), seed=seed, r=4) for seed in range(100)]
    messages = [LoadAdapter(digest_of(one.directory), str(one.directory), one.directory.name) for one in oracles]
    expected = [greedy(oracle, [5, 6, 7], 4) for oracle in oracles]
    assert len({tuple(tokens) for tokens in expected}) > 50
    engine = adapted.engine(max_loras=4, max_cpu_loras=in_memory, max_num_seqs=8)
    load(engine, *messages)
    rng = random.Random(1)
    numbers = [rng.randrange(100) for _ in range(1000)]
    begun: dict[str, float] = {}
    steps: dict[str, int] = {}
    tokens: dict[str, list[int]] = {str(i): [] for i in range(1000)}
    waits: dict[str, float] = {}
    num_steps = 0
    while len(waits) < 1000:
        for _ in range(min(4, 1000 - len(begun))):
            name = str(len(begun))
            begun[name] = time.perf_counter()
            steps[name] = num_steps
            asked = make_request(name, [5, 6, 7], max_tokens=4)
            assert not engine.add(msgspec.structs.replace(asked, adapter=messages[numbers[int(name)]].digest))
        _, refused = engine.take_adapters()
        assert not refused
        num_steps += engine.has_work
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.request_id not in waits:
                waits[output.request_id] = time.perf_counter() - begun[output.request_id]
                steps[output.request_id] = num_steps - steps[output.request_id]
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert all(tokens[str(i)] == expected[number] for i, number in enumerate(numbers))
    in_order = sorted(waits.values())
    print(f"\n{in_memory} in memory: first tokens after {in_order[500]:.3f} s (median), {in_order[990]:.3f} s (p99)")
    # All 1,000 need 250 turns of a slot at most, of 4 steps each, if no two share one: the last one can't wait longer
    # than everybody together needs, and whoever waits is overtaken only by those of the adapters in the slots.
    assert max(steps.values()) <= num_steps
    late = [steps[str(i)] for i in range(900, 1000)]
    assert max(steps.values()) <= 2 * max(late)


def greedy(oracle: PeftOracle, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(oracle.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_a_name_given_to_other_files_is_another_adapter(adapted: Adapted) -> None:
    """Requests under way go on with what they began with, and no block of one is the other's."""
    engine = adapted.engine()
    load(engine, adapted.message(0))
    prompt = list(range(3, 20))
    first = adapted.request("first", prompt, 0, max_tokens=12)
    assert not engine.add(first)
    begun = engine.step()
    load(engine, adapted.message(1))
    engine.drop_adapter(adapted.digests[0])
    second = adapted.request("second", prompt, 1, max_tokens=12)
    assert not engine.add(second)
    late = engine.add(adapted.request("late", prompt, 0))
    assert late[0].is_refused
    assert "is not loaded" in str(late[0].error)
    outputs = {"first": begun, "second": []}
    while engine.has_work:
        engine.take_adapters()
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert tokens_of(outputs["first"]) == adapted.greedy(prompt, 0, 12)
    assert tokens_of(outputs["second"]) == adapted.greedy(prompt, 1, 12)
    engine.take_adapters()
    assert engine.adapters is not None
    assert set(engine.adapters._entries) == {adapted.digests[1]}  # the other is gone, now that nobody uses it


def test_cached_prefixes_are_an_adapter_s_own(adapted: Adapted, tmp_path: Path) -> None:
    engine = adapted.engine(max_loras=3)
    copied = shutil.copytree(adapted.oracles[0].directory, tmp_path / "the same under another name")
    load(engine, adapted.message(0), adapted.message(1))
    assert load(engine, LoadAdapter(digest_of(copied), str(copied), "copy")) == {adapted.digests[0]: ""}
    prompt = list(range(3, 20))
    cached = {}
    for name, number in (("plain", None), ("one", 0), ("other", 1), ("one again", 0), ("plain again", None)):
        (output, *_) = run(engine, [adapted.request(name, prompt, number, max_tokens=1)])[name]
        assert output.token_ids == adapted.greedy(prompt, number, 1)
        cached[name] = output.num_cached_tokens
    assert cached == {"plain": 0, "one": 0, "other": 0, "one again": 16, "plain again": 16}


def test_blocks_in_a_file_are_an_adapter_s_own(adapted: Adapted, tmp_path: Path) -> None:
    prompt = list(range(3, 20))
    cached = []
    for number in (0, 1, None, 0, None, 1):
        engine = adapted.engine(kv_offloading_size=0.01, kv_offloading_path=str(tmp_path))
        if number is not None:
            load(engine, adapted.message(number))
        (output, *_) = run(engine, [adapted.request("r", prompt, number, max_tokens=1)])["r"]
        assert output.token_ids == adapted.greedy(prompt, number, 1)
        cached.append(output.num_cached_tokens)
        engine.close()
    assert cached == [0, 0, 0, 16, 16, 16]


def test_preempted_requests_get_their_adapter_again(adapted: Adapted) -> None:
    engine = adapted.engine(max_loras=1, max_cpu_loras=2, num_blocks=12, max_model_len=36, kv_cache_memory_bytes=None)
    load(engine, adapted.message(0), adapted.message(1))
    given = list(zip(prompts(6, seed=4), [0, 1, 0, None, 1, 0], strict=True))
    requests = [adapted.request(str(i), prompt, it, max_tokens=20) for i, (prompt, it) in enumerate(given)]
    outputs = run(engine, requests)
    for i, (prompt, number) in enumerate(given):
        assert tokens_of(outputs[str(i)]) == adapted.greedy(prompt, number, 20)
    assert engine.scheduler.stats().num_preemptions > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_recorded_steps_give_the_bits_of_the_layers(dtype: str, tmp_path: Path) -> None:
    """With adapters that come, go and change places between steps of one size."""
    name, overrides = CASES["qwen2"]
    base = make_hf(name, overrides | {"head_dim": 32})
    directory = save(base, tmp_path / "base")
    oracles = [PeftOracle(base, tmp_path / str(i), seed=i, r=3 + 20 * i) for i in range(2)]
    answers = []
    for eager in (False, True):
        lora = LoraOptions(enable_lora=True, max_loras=1, max_cpu_loras=2)
        sizes = {"block_size": 4, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 20}
        config = EngineConfig(model=str(directory), dtype=dtype, lora=lora, enforce_eager=eager, **sizes)
        engine = load_engine(config, time.time())[0]
        digests = [digest_of(oracle.directory) for oracle in oracles]
        load(engine, *(LoadAdapter(d, str(o.directory), "x") for d, o in zip(digests, oracles, strict=True)))
        found = []
        for i in range(4):
            requests = [
                msgspec.structs.replace(
                    make_request(f"{i}.{j}", [7 + i, 8 + j, 9], max_tokens=12, logprobs=2),
                    adapter=digests[i % 2] if j != 1 else "",
                )
                for j in range(3)
            ]
            found.append({n: [(o.token_ids, o.logprobs) for o in out] for n, out in run(engine, requests).items()})
        answers.append(found)
        if not eager:
            assert engine.worker.replays is not None
            assert any(size.uses_adapters for size in engine.worker.replays.proven)
    assert answers[0] == answers[1]


def test_adapters_that_can_t_be_read_are_told_by_name(adapted: Adapted, tmp_path: Path) -> None:
    engine = adapted.engine(max_loras=1)
    gone = shutil.copytree(adapted.oracles[0].directory, tmp_path / "gone")
    wrong = shutil.copytree(adapted.oracles[1].directory, tmp_path / "wrong")
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps(config | {"r": 7}))
    messages = [LoadAdapter(digest_of(path), str(path), path.name) for path in (gone, wrong)]
    told = load(engine, *messages)
    assert told[messages[0].digest] == ""
    assert "this model needs [7, " in told[messages[1].digest]
    refused = engine.add(msgspec.structs.replace(make_request("a", [3, 4]), adapter=messages[1].digest))
    assert "is not loaded" in str(refused[0].error)
    load(engine, adapted.message(2))  # and the only place in memory is another's
    shutil.rmtree(gone)
    asked = msgspec.structs.replace(make_request("b", [3, 4]), adapter=messages[0].digest)
    outputs = run(engine, [asked, adapted.request("c", [3, 4], 2, max_tokens=2)])
    assert outputs["b"][0].is_refused
    assert f"{gone} has no adapter_config.json" in str(outputs["b"][0].error)
    assert tokens_of(outputs["c"]) == adapted.greedy([3, 4], 2, 2)


def test_an_engine_without_adapters_says_so(adapted: Adapted) -> None:
    config = EngineConfig(model=str(adapted.directory), dtype="float32", block_size=4, kv_cache_memory_bytes=1 << 20)
    engine = load_engine(config, time.time())[0]
    answer = engine.load_adapter(adapted.message(0))
    assert answer is not None
    assert "--enable-lora serves them" in answer.error
    assert engine.add(adapted.request("a", [3], 0))[0].is_refused
    assert run_to_end(engine, [make_request("b", [3])])["b"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": LoraOptions(enable_lora=True, max_loras=4, max_cpu_loras=3)}, "--max-cpu-loras 4 works"),
        ({"model_impl": "hf"}, "adapters are served by octavo's own decoder"),
    ],
)
def test_what_adapters_don_t_go_with_is_told_at_start(settings: dict[str, Any], said: str, adapted: Adapted) -> None:
    options = {"lora": LoraOptions(enable_lora=True)} | settings
    with pytest.raises(ValueError, match=said):
        load_engine(EngineConfig(model=str(adapted.directory), **options), time.time())


def test_ranks_of_several_machines_have_no_adapters(adapted: Adapted) -> None:
    """Told before a process is started."""
    lora = LoraOptions(enable_lora=True)
    apart = ParallelConfig(tensor_parallel_size=2, nnodes=2, master_addr="10.0.0.1")
    with pytest.raises(ValueError, match="all ranks of an engine read adapters on one machine"):
        Launcher(EngineConfig(model=str(adapted.directory), lora=lora, parallel=apart))


# The scheduler's part alone: adapters that are up, and a model that says 1.


def scheduler(max_loras: int, max_num_seqs: int = 4) -> Scheduler:
    sizes = {"num_blocks": 64, "block_size": 4, "max_model_len": 64}
    return Scheduler(SchedulerConfig(max_loras=max_loras, max_num_seqs=max_num_seqs, **sizes))


def up(*names: str) -> list[Adapter]:
    adapters = [Adapter(name, name) for name in names]
    for adapter in adapters:
        adapter.is_up = True
    return adapters


def add(it: Scheduler, name: str, adapter: Adapter | None, max_tokens: int = 3) -> None:
    assert it.add(AddRequest(name, [3, 4], SamplingParams(max_tokens), 0.0), adapter=adapter) is None


def step(it: Scheduler) -> list[str]:
    """Those that were computed."""
    plan = it.plan()
    it.commit(plan, StepResult([[1] for _ in plan.scheduled]))
    return [scheduled.sequence.request_id for scheduled in plan.scheduled]


def test_one_step_has_as_many_adapters_as_there_are_slots() -> None:
    it = scheduler(2)
    a, b, c = up("a", "b", "c")
    for name, adapter in (("1", a), ("2", b), ("3", c), ("4", None), ("5", b)):
        add(it, name, adapter)
    assert step(it) == ["1", "2", "4", "5"]  # b has its slot later than a, which is closed for those behind 3


def test_an_adapter_that_is_not_up_holds_nobody_up() -> None:
    it = scheduler(1)
    a, b = up("a", "b")
    a.is_up = False
    add(it, "1", a)
    add(it, "2", b, max_tokens=2)
    assert step(it) == ["2"]
    a.is_up = True
    add(it, "3", b, max_tokens=2)
    assert step(it) == ["2"]  # 1 has waited longer than 3, and its adapter gets the slot next
    assert step(it) == ["1"]
    it = scheduler(1)
    a.is_up = False
    add(it, "1", a)
    assert not it.has_work


def test_nobody_waits_for_ever_beside_a_stream_of_others() -> None:
    it = scheduler(2)
    a, b, c = up("a", "b", "c")
    waited = 0
    add(it, "a0", a)
    add(it, "b0", b)
    step(it)
    add(it, "c", c)
    for i in range(1, 50):  # there is always one of a and of b that could begin
        add(it, f"a{i}", a)
        add(it, f"b{i}", b)
        waited += 1
        if "c" in step(it):
            break
    assert waited <= 4


def test_a_slot_is_kept_while_a_step_under_way_uses_it() -> None:
    it = scheduler(1)
    a, b = up("a", "b")
    add(it, "1", a)
    plan = it.plan()
    a.num_steps += 1  # as the engine counts
    it.abort(["1"])
    add(it, "2", b)
    assert not it.plan().scheduled
    it.commit(plan, StepResult([[1]]))
    a.num_steps -= 1
    assert step(it) == ["2"]
    assert (a.slot, b.slot) == (-1, 0)
