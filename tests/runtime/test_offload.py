"""Blocks in a file: answers are what they are without it, whatever happens to the file, the process or the pool."""

from __future__ import annotations

import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slow_cases import slow
from toy_model import NaNModel, ToyModel, greedy, make_engine, make_request, random_requests, tokens_of

from octavo.runtime.engine import Engine
from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.runtime.offload import block_file
from octavo.runtime.offload.block_file import ENTRY, PAGE, BlockFile, BlockFileError
from octavo.runtime.offload.costs import NUM_KEPT, PROBE, FetchCosts
from octavo.runtime.offload.offload import Offload
from octavo.runtime.offload.rows import BlockRows

TOY = {"model": "toy"}
ROW = PAGE  # a toy's block and its head fit into a page


def size_of(num_slots: int) -> int:
    return PAGE + num_slots * (ROW + ENTRY.itemsize)


def offloading(
    directory: Path,
    num_slots: int = 256,
    model: ToyModel | None = None,
    file: type[BlockFile] = BlockFile,
    **limits: Any,
) -> Engine:
    engine = make_engine(model, **limits)
    rows = BlockRows(engine.worker.caches)
    opened = file(directory, 0, TOY, rows.block_bytes, size_of(num_slots))
    engine.offload = Offload(opened, rows, engine.scheduler.prefixes)
    return engine


def offload_of(engine: Engine) -> Offload:
    assert engine.offload is not None
    return engine.offload


def run(engine: Engine, requests: list[AddRequest], rng: random.Random | None = None) -> dict[str, list[TokenOutput]]:
    """All outputs; with rng, requests come between steps."""
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    pending = list(requests)
    while pending or engine.has_work or engine.scheduler.waiting:
        while pending and (rng is None or rng.random() < 0.5):
            assert not engine.add(pending.pop(0))
        if not engine.has_work and not pending:
            assert select.select([offload_of(engine).ready], [], [], 60)[0]
        engine.take_fetched()
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine.scheduler.pool.check([])
    return outputs


def settle(engine: Engine) -> None:
    """Until what has been offered is in the file: a thread writes it."""
    offload = offload_of(engine)
    offload._writer.submit(int).result()
    offload.take_offers(0, 0)


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


PROMPT = [(7 * i * i + i) % 50 for i in range(45)]  # 11 blocks of 4, and a token that is always computed


@pytest.mark.parametrize("seed", [*range(12), *map(slow, range(12, 80))])
def test_answers_are_the_same_over_restarts_with_a_full_pool_and_a_full_file(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, 12)
    num_slots = rng.choice([3, 20, 300])
    limits = {
        "num_blocks": 16 + rng.randrange(12),
        "max_model_len": 64,
        "max_num_batched_tokens": rng.choice([3, 8, 64]),
    }
    for overlaps in (True, False, True):
        engine = offloading(tmp_path, num_slots, overlaps=overlaps, max_num_seqs=rng.randrange(1, 8), **limits)
        outputs = run(engine, requests, rng)
        assert {name: tokens_of(output) for name, output in outputs.items()} == {
            request.request_id: greedy(request) for request in requests
        }
        firsts = [output[0] for output in outputs.values()]
        assert all(0 <= it.num_fetched_tokens <= (it.num_cached_tokens or 0) for it in firsts)
        assert engine.scheduler.stats().prefix_cache_hits >= 0
        assert bytes_in(tmp_path) <= size_of(num_slots)
        engine.close()


def test_the_random_runs_do_fetch_preempt_and_evict(tmp_path: Path) -> None:
    hits = preemptions = 0
    for seed in range(6):
        rng = random.Random(seed)
        requests = random_requests(rng, 12)
        for _ in range(2):
            engine = offloading(tmp_path / str(seed), 40, num_blocks=18, max_model_len=64, max_num_seqs=6)
            run(engine, requests, rng)
            engine.close()
            hits += offload_of(engine).stats().num_hits
            preemptions += engine.scheduler.stats().num_preemptions
            assert offload_of(engine).stats().usage <= 1
    assert hits > 100
    assert preemptions > 2


def test_a_prompt_that_was_computed_before_the_restart_is_read(tmp_path: Path) -> None:
    request = make_request("r", PROMPT, max_tokens=9)
    first = offloading(tmp_path)
    assert run(first, [request])["r"][0].num_cached_tokens == 0
    first.close()
    second = offloading(tmp_path)
    outputs = run(second, [request])["r"]
    assert tokens_of(outputs) == greedy(request)
    assert (outputs[0].num_cached_tokens, outputs[0].num_fetched_tokens) == (44, 44)
    stats = second.stats()
    assert (stats.prefix_cache_hits, stats.offload.num_hits, stats.offload.num_queries) == (0, 44, 44)
    longer = make_request("longer", [*PROMPT, *tokens_of(outputs), 1], max_tokens=3)
    again = run(second, [longer])["longer"]
    assert (again[0].num_cached_tokens, again[0].num_fetched_tokens) == (52, 0), "the pool has them, of the answer too"
    second.close()


def test_what_a_salt_names_is_found_under_the_same_salt_alone(tmp_path: Path) -> None:
    def cached(salt: str) -> int | None:
        engine = offloading(tmp_path)
        request = AddRequest("r", PROMPT, make_request("r", PROMPT).params, 0.0, cache_salt=salt)
        outputs = run(engine, [request])["r"]
        assert tokens_of(outputs) == greedy(request)
        engine.close()
        return outputs[0].num_cached_tokens

    assert [cached(salt) for salt in ("a", "b", "", "b", "a", "")] == [0, 0, 0, 44, 44, 44]


class _Disk(BlockFile):
    """One that answers when it is let."""

    gate = threading.Event()

    def read(self, *arguments: Any) -> Any:
        assert self.gate.wait(60)
        return super().read(*arguments)


@pytest.mark.parametrize("overlaps", [True, False])
def test_others_are_computed_while_a_request_waits_for_its_blocks(tmp_path: Path, overlaps: bool) -> None:
    slow_one = make_request("slow", PROMPT)
    first = offloading(tmp_path)
    run(first, [slow_one])
    first.close()
    _Disk.gate.clear()
    engine = offloading(tmp_path, file=_Disk, overlaps=overlaps, num_blocks=32)
    others = [make_request(f"r{i}", [i, 2, 3], max_tokens=12) for i in range(4)]
    outputs: list[TokenOutput] = []
    for request in (slow_one, *others):
        engine.add(request)
    while engine.has_work:
        engine.take_fetched()
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"r0", "r1", "r2", "r3"}
    assert engine.stats().num_deferred == 1
    _Disk.gate.set()
    assert select.select([offload_of(engine).ready], [], [], 60)[0]
    engine.take_fetched()
    found: list[TokenOutput] = []
    while engine.has_work:
        found += engine.step()
    assert tokens_of(found) == greedy(slow_one)
    assert found[0].num_fetched_tokens == 44
    engine.close()


def test_a_request_that_is_gone_when_its_blocks_come_leaves_them_to_others(tmp_path: Path) -> None:
    request = make_request("r", PROMPT)
    first = offloading(tmp_path)
    run(first, [request])
    first.close()
    _Disk.gate.clear()
    engine = offloading(tmp_path, file=_Disk)
    engine.add(request)
    engine.step()
    assert engine.scheduler.pool.num_free == 64 - 11
    engine.scheduler.abort(["r"])
    _Disk.gate.set()
    assert select.select([offload_of(engine).ready], [], [], 60)[0]
    engine.take_fetched()
    engine.scheduler.pool.check([])
    outputs = run(engine, [make_request("other", PROMPT)])["other"]
    assert (outputs[0].num_cached_tokens, outputs[0].num_fetched_tokens) == (44, 0)
    engine.close()


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(60):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _shuffle(path: Path, rng: random.Random) -> None:
    """Records, or entries, of other slots."""
    data = path.read_bytes()
    size = ROW if path.suffix == ".kv" else ENTRY.itemsize
    begin = 0 if path.suffix == ".kv" else PAGE
    pieces = [data[i : i + size] for i in range(begin, len(data), size)]
    rng.shuffle(pieces)
    path.write_bytes(data[:begin] + b"".join(pieces))


def _noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


@pytest.mark.parametrize("suffix", [".kv", ".index"])
@pytest.mark.parametrize("damage", [_flip, _truncate, _shuffle, _noise])
def test_a_damaged_file_changes_no_answer(
    damage: Callable[[Path, random.Random], None], suffix: str, tmp_path: Path
) -> None:
    rng = random.Random(3)
    requests = random_requests(rng, 10)
    engine = offloading(tmp_path)
    run(engine, requests)
    engine.close()
    for _ in range(4):
        damage(tmp_path / f"engine-0{suffix}", rng)
        engine = offloading(tmp_path)
        outputs = run(engine, requests)
        assert all(tokens_of(outputs[request.request_id]) == greedy(request) for request in requests)
        engine.close()
        assert bytes_in(tmp_path) <= size_of(256)


def test_damaged_blocks_are_counted_and_written_anew(tmp_path: Path) -> None:
    request = make_request("r", PROMPT)
    for _ in range(2):
        engine = offloading(tmp_path)
        run(engine, [request])
        engine.close()
    with (tmp_path / "engine-0.kv").open("r+b") as file:
        file.seek(3 * ROW + 70)
        file.write(b"\xff\xff\xff")
    engine = offloading(tmp_path)
    outputs = run(engine, [request])["r"]
    assert tokens_of(outputs) == greedy(request)
    assert outputs[0].num_cached_tokens == outputs[0].num_fetched_tokens == 12
    assert offload_of(engine).stats().num_damaged == 1
    engine.close()
    engine = offloading(tmp_path)
    assert run(engine, [request])["r"][0].num_cached_tokens == 44
    engine.close()


def test_blocks_that_lie_in_each_other_s_place_are_written_anew(tmp_path: Path) -> None:
    """As where a process dies between a block and the entry that names it."""
    request = make_request("r", PROMPT)
    engine = offloading(tmp_path)
    run(engine, [request])
    engine.close()
    path = tmp_path / "engine-0.kv"
    data = path.read_bytes()
    path.write_bytes(data[: 3 * ROW] + data[4 * ROW : 5 * ROW] + data[3 * ROW : 4 * ROW] + data[5 * ROW :])
    found = []
    for _ in range(2):
        engine = offloading(tmp_path)
        outputs = run(engine, [request])["r"]
        assert tokens_of(outputs) == greedy(request)
        assert offload_of(engine).stats().num_damaged == 0
        found.append(outputs[0].num_cached_tokens)
        engine.close()
    assert found == [12, 44]


@pytest.mark.parametrize("seed", range(6))
def test_a_process_that_is_killed_leaves_nothing_that_is_wrong(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, 24)
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            engine = offloading(tmp_path, 60, num_blocks=40, max_model_len=64)
            while True:
                run(engine, requests, rng)
                offload_of(engine).forget()
        finally:
            os._exit(1)
    while not (tmp_path / "engine-0.kv").exists():
        time.sleep(0.001)
    time.sleep(rng.random() * 0.15)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    engine = offloading(tmp_path, 60, num_blocks=40, max_model_len=64)
    outputs = run(engine, requests)
    assert all(tokens_of(outputs[request.request_id]) == greedy(request) for request in requests)
    engine.close()


def test_what_made_logits_unusable_is_not_found_after_a_restart(tmp_path: Path) -> None:
    poisoned = [*PROMPT[:30], 13]
    engine = offloading(tmp_path, model=NaNModel())
    outputs = run(engine, [make_request("before", [*PROMPT[:20], 1]), make_request("poisoned", poisoned)])
    assert outputs["poisoned"][-1].error
    engine.close()
    engine = offloading(tmp_path)
    outputs = run(engine, [make_request("r", [*poisoned, 1])])
    assert outputs["r"][0].num_cached_tokens == 0
    engine.close()


@pytest.mark.parametrize("over_a_restart", [True, False])
def test_what_is_forgotten_is_not_found(over_a_restart: bool, tmp_path: Path) -> None:
    request = make_request("r", PROMPT)
    engine = offloading(tmp_path)
    run(engine, [request])
    engine.forget_prefixes()
    if over_a_restart:
        engine.close()
        engine = offloading(tmp_path)
    assert run(engine, [request])["r"][0].num_cached_tokens == 0
    engine.close()
    engine = offloading(tmp_path)
    assert run(engine, [request])["r"][0].num_cached_tokens == 44
    offload_of(engine).forget({"model": "another"})
    engine.close()
    engine = offloading(tmp_path)
    assert offload_of(engine).file.note.endswith("its blocks are of another model, so it is begun anew")
    engine.close()


def test_a_fetch_that_was_under_way_when_all_was_forgotten_brings_nothing(tmp_path: Path) -> None:
    request = make_request("r", PROMPT)
    engine = offloading(tmp_path)
    run(engine, [request])
    engine.close()
    _Disk.gate.clear()
    engine = offloading(tmp_path, file=_Disk)
    engine.add(request)
    engine.step()
    engine.forget_prefixes()
    _Disk.gate.set()
    while engine.has_work or engine.scheduler.waiting:
        engine.take_fetched()
        for output in engine.step():
            assert not output.num_cached_tokens
    engine.scheduler.pool.check([])
    engine.close()


def block_names(count: int) -> list[bytes]:
    return [bytes([i]) * 32 + (b"\0\1" if i % 2 else b"") for i in range(count)]


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    names = block_names(6)
    file = BlockFile(tmp_path, 0, TOY, 100, size_of(4))
    assert file.num_slots == 4
    for slot, name in enumerate(names[:4]):
        file.write(slot, name, np.full(ROW, slot, np.uint8))
    file.stamp([(1, names[1]), (0, names[0])])
    file.close()
    file = BlockFile(tmp_path, 0, TOY, 100, size_of(4))
    assert file.found == [(names[i], i) for i in (2, 3, 1, 0)]
    file.clear([3])
    file.write(2, names[5], np.full(ROW, 5, np.uint8))
    row = np.empty(ROW, np.uint8)
    assert [file.read(slot, names[slot], row) for slot in (0, 1, 2)] == ["right", "right", "gone"]
    assert file.read(2, names[5], row) == "right"
    assert (row[64:] == 5).all()
    file.close()
    file = BlockFile(tmp_path, 0, TOY, 100, size_of(2))
    assert file.found == [(names[1], 1), (names[0], 0)], "a smaller size drops what lies behind it"
    assert bytes_in(tmp_path) <= size_of(2)
    file.close()


def test_a_directory_is_one_engine_s_and_nobody_else_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_file, "LOCK_SECONDS", 0.1)
    directory = tmp_path / "new" / "kv"
    file = BlockFile(directory, 0, TOY, 100, size_of(4))
    with pytest.raises(BlockFileError, match=r"engine-0\.kv is in use by another engine"):
        BlockFile(directory, 0, TOY, 100, size_of(4))
    BlockFile(directory, 1, TOY, 100, size_of(4)).close()
    file.close()
    BlockFile(directory, 0, TOY, 100, size_of(4)).close()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())
    with pytest.raises(BlockFileError, match=r"hold no block of 100; 8,256 are one"):
        BlockFile(directory, 2, TOY, 100, 5000)


def test_a_disk_that_is_full_ends_the_writing_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import resource

    requests = [make_request(f"r{i}", [i, *PROMPT], max_tokens=3) for i in range(4)]
    engine = offloading(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * ROW, before[1]))
    try:
        outputs = run(engine, requests[:2])
        settle(engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    outputs |= run(engine, requests[2:])
    assert all(tokens_of(outputs[request.request_id]) == greedy(request) for request in requests)
    assert caplog.text.count("no further blocks are") == 1
    settle(engine)
    assert (tmp_path / "engine-0.kv").stat().st_size == 5 * ROW
    engine.forget_prefixes()
    assert offload_of(engine)._num_staged == 0, "there is as much room as at first"
    outputs = run(engine, requests[:1])
    engine.close()
    engine = offloading(tmp_path)
    assert run(engine, requests[:1])["r0"][0].num_cached_tokens == 44, "written again, since all was forgotten"
    engine.close()


def test_reading_is_done_where_it_is_faster_than_computing() -> None:
    costs = FetchCosts()
    assert costs.pays(16, 1), "nothing is known"
    costs._of_tokens.extend([0.001] * NUM_KEPT)  # 16 ms a block
    assert costs.pays(16, 1)
    costs.read(10, 0.150)
    assert costs.pays(16, 1)
    assert not costs.pays(16, 2)
    for _ in range(NUM_KEPT):
        costs.read(1, 0.020)
    answers = [costs.pays(160, 10) for _ in range(2 * PROBE)]
    assert sum(answers) == 2, "now and then it is tried"
