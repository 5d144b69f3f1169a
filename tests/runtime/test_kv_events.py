"""KV events: the scheduler's, whose random traffic test_scheduler.py compares with the cache, and the publisher's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq
from vllm_kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVIndex, decode, hash_of

from octavo.runtime.config import EngineConfig, KVEventsConfig
from octavo.runtime.kv_event_publisher import END, KVEventPublisher, endpoint_of
from octavo.runtime.messages import AddRequest, SamplingParams
from octavo.runtime.scheduling import kv_events
from octavo.runtime.scheduling.plan import SchedulerConfig, StepResult
from octavo.runtime.scheduling.scheduler import Scheduler
from octavo.runtime.startup import check_limits

PATIENCE_MS = 60_000  # not a measurement: only so that a hang is a failure


def scheduler(**limits: object) -> Scheduler:
    config = {"num_blocks": 8, "block_size": 4, "max_model_len": 64, "tells_kv_events": True} | limits
    return Scheduler(SchedulerConfig(**config))


def answer(it: Scheduler, prompt: list[int], salt: str = "", max_tokens: int = 1) -> list[BlockStored | BlockRemoved]:
    """Serve one request, whose answer is 7, 7, ...; the events of that, as a listener decodes them."""
    it.add(AddRequest("a", prompt, SamplingParams(max_tokens=max_tokens), 0.0, salt))
    while it.has_work:
        plan = it.plan()
        it.commit(plan, StepResult([[7] if at.wants == "token" else [] for at in plan.scheduled]))
    return told(it)


def told(it: Scheduler) -> list[BlockStored | BlockRemoved]:
    batch = kv_events.KVEventBatch(1.5, it.take_kv_events(), 0)
    found = decode(msgspec.msgpack.encode(batch))
    assert (found.ts, found.data_parallel_rank) == (1.5, 0)
    return found.events


def stored(tokens: list[int], before: list[int], *salts: str | None, group: int = 0, window: int | None = None):
    """The event of blocks of 4 tokens that follow each other."""
    salt = next(filter(None, salts), "")
    ends = range(4, len(tokens) + 1, 4)
    return BlockStored(
        block_hashes=[hash_of(before + tokens[:end], 4, salt) for end in ends],
        parent_block_hash=hash_of(before, 4, salt) if before else None,
        token_ids=tokens,
        block_size=4,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[(it,) if it else None for it in salts] or [None] * len(ends),
        group_idx=group,
        kv_cache_spec_kind="sliding_window" if window else "full_attention",
        kv_cache_spec_sliding_window=window,
    )


def test_a_message_has_vllm_s_bytes() -> None:
    """Written out by hand, from vLLM's declaration and msgpack's specification."""
    it = scheduler(block_size=1)
    it.add(AddRequest("a", [5, 6], SamplingParams(max_tokens=1), 0.0))
    it.plan()
    payload = msgspec.msgpack.encode(kv_events.KVEventBatch(1.5, it.take_kv_events(), 0))

    def word(text: str) -> bytes:
        return bytes([0xA0 + len(text)]) + text.encode()

    assert payload == b"".join(
        [
            b"\x93\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00\x91",  # [1.5, [
            b"\x8b" + word("type") + word("BlockStored"),  # a map of 11
            word("block_hashes") + b"\x91\xcf" + hash_of([5], 1).to_bytes(8, "big"),
            word("parent_block_hash") + b"\xc0",
            word("token_ids") + b"\x91\x05",
            word("block_size") + b"\x01",
            word("lora_id") + b"\xc0",
            word("medium") + word("GPU"),
            word("lora_name") + b"\xc0",
            word("extra_keys") + b"\x91\xc0",
            word("group_idx") + b"\x00",
            word("kv_cache_spec_kind") + word("full_attention"),
            b"\x00",  # ], rank]
        ]
    )


def test_full_blocks_are_told_once_with_what_stands_before_them() -> None:
    it = scheduler()
    prompt = list(range(10, 20))
    assert answer(it, prompt, max_tokens=4) == [stored(prompt[:8], []), stored([18, 19, 7, 7], prompt[:8])]
    assert answer(it, prompt) == []
    assert answer(it, prompt[:4] + [0] * 6) == [stored([0] * 4, prompt[:4])]


def test_other_salts_are_other_blocks() -> None:
    it = scheduler()
    prompt = list(range(9))
    assert answer(it, prompt) == [stored(prompt[:8], [])]
    assert answer(it, prompt, "s") == [stored(prompt[:8], [], "s", None)]


def test_what_is_evicted_is_told_before_what_takes_its_place() -> None:
    it = scheduler(num_blocks=3)
    answer(it, [1] * 9)
    gone = [hash_of([1] * 8, 4), hash_of([1] * 4, 4)]
    events = answer(it, [2] * 9)
    assert events == [BlockRemoved(gone, "GPU", 0), stored([2] * 8, [])]


def test_a_reset_is_one_event_where_nothing_is_left() -> None:
    it = scheduler()
    answer(it, [1] * 9)
    it.reset_prefix_cache()
    assert told(it) == [AllBlocksCleared()]
    answer(it, [1] * 9)
    it.add(AddRequest("b", [2] * 9, SamplingParams(max_tokens=2), 0.0))
    it.plan()  # holds its blocks
    it.reset_prefix_cache()
    assert told(it) == [stored([2] * 8, []), BlockRemoved([hash_of([1] * 8, 4), hash_of([1] * 4, 4)], "GPU", 0)]


def test_groups_of_layers_are_told_apart() -> None:
    it = scheduler(num_blocks=16, windows=(None, 5))
    prompt = list(range(9))
    assert answer(it, prompt) == [stored(prompt[:8], []), stored(prompt[:8], [], group=1, window=5)]


def test_a_block_is_told_after_the_one_before_it() -> None:
    """Though that one's last token is a step of its own, under way while a chunk that fills the next is planned."""
    it = scheduler(max_num_batched_tokens=4, num_blocks=16)
    for number in range(3):
        it.add(AddRequest(f"short {number}", [number], SamplingParams(max_tokens=4), 0.0))
    prompt = list(range(10, 19))
    it.add(AddRequest("long", prompt, SamplingParams(max_tokens=1), 0.0))
    for _ in range(3):
        plan = it.plan()
        it.commit(plan, StepResult([[7] if at.wants == "token" else [] for at in plan.scheduled]))
    single = it.plan()
    chunk = it.plan()
    assert [(at.start, at.end) for plan in (single, chunk) for at in plan.scheduled[-1:]] == [(3, 4), (4, 8)]
    it.commit(single, StepResult([[7] if at.wants == "token" else [] for at in single.scheduled]))
    it.commit(chunk, StepResult([[]]))
    index = KVIndex()
    for event in told(it):
        index._store(event)  # a block whose parent it hasn't been told of is a KeyError
    assert {(0, hash_of(prompt[:end], 4)) for end in (4, 8)} <= index.blocks


def test_nothing_is_collected_where_nobody_asks() -> None:
    it = scheduler(tells_kv_events=False)
    assert answer(it, [1] * 9) == []


@contextmanager
def publishing(path: Path, **options: object) -> Iterator[tuple[KVEventPublisher, zmq.Socket, zmq.Socket]]:
    """A publisher, its listener, and a client of its replays."""
    addresses = {"endpoint": f"ipc://{path}/events", "replay_endpoint": f"ipc://{path}/replay"}
    publisher = KVEventPublisher(KVEventsConfig(enable_kv_cache_events=True, topic="kv", **addresses, **options))
    with zmq.Context() as context, context.socket(zmq.SUB) as listener, context.socket(zmq.DEALER) as client:
        for socket in (listener, client):
            socket.linger = 0
            socket.rcvtimeo = PATIENCE_MS
        listener.set_hwm(0)
        listener.subscribe("kv")
        listener.connect(addresses["endpoint"])
        client.rcvhwm = 1
        client.connect(addresses["replay_endpoint"])
        while not listener.poll(10):  # until the subscription has arrived
            publisher.publish([kv_events.AllBlocksCleared()])
        try:
            yield publisher, listener, client
        finally:
            publisher.close()


def event(number: int) -> kv_events.KVCacheEvent:
    return kv_events.BlockRemoved([number], "GPU", 0)


def replay(client: zmq.Socket, begin: int) -> list[tuple[int, bytes]]:
    client.send_multipart([b"", begin.to_bytes(8, "big")])
    found = []
    while True:
        empty, topic, number, payload = client.recv_multipart()
        assert empty == b""
        if number == END:
            assert (topic, payload) == (b"", b"")
            return found
        assert topic == b"kv"
        found.append((int.from_bytes(number, "big"), payload))


def live(listener: zmq.Socket, last: int) -> list[tuple[int, bytes]]:
    """Messages up to the one in which block `last` is removed."""
    found = []
    while True:
        topic, number, payload = listener.recv_multipart()
        assert topic == b"kv"
        found.append((int.from_bytes(number, "big"), payload))
        events = decode(payload).events
        if isinstance(events[0], BlockRemoved) and events[0].block_hashes == [last]:
            return found


def test_messages_are_numbered_and_come_again_for_who_asks(tmp_path: Path) -> None:
    with publishing(tmp_path) as (publisher, listener, client):
        before = time.time()
        for number in range(5):
            publisher.publish([event(number)])
        publisher.publish([])  # a step without events is no message
        heard = live(listener, 4)
        numbers = [number for number, _ in heard]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert before <= decode(heard[-1][1]).ts <= time.time()
        assert decode(heard[-1][1]).data_parallel_rank == 0
        assert replay(client, numbers[-2]) == heard[-2:]
        assert replay(client, numbers[-1] + 1) == []
        assert replay(client, 0)[-len(heard) :] == heard


def test_only_the_last_messages_are_kept(tmp_path: Path) -> None:
    with publishing(tmp_path, buffer_steps=3) as (publisher, listener, client):
        for number in range(10):
            publisher.publish([event(number)])
        heard = live(listener, 9)
        assert replay(client, 0) == heard[-3:]


def test_a_replay_loses_nothing_however_slowly_it_is_read(tmp_path: Path) -> None:
    """More messages than all queues between the two hold; events go on meanwhile."""
    count = 6000
    with publishing(tmp_path) as (publisher, listener, client):
        for number in range(count):
            publisher.publish([event(number)] * 20)
        publisher.publish([event(-1)])
        heard = live(listener, -1)
        client.send_multipart([b"", (heard[-1][0] - count).to_bytes(8, "big")])
        assert client.poll(PATIENCE_MS)
        publisher.publish([event(-2)])
        assert len(live(listener, -2)) == 1
        found = [client.recv_multipart() for _ in range(count + 3)]
        assert [frames[3] for frames in found[: count + 1]] == [payload for _, payload in heard[-count - 1 :]]
        assert found[-1][2] == END


def test_a_replay_of_nonsense_gets_no_answer_and_does_no_harm(tmp_path: Path) -> None:
    with publishing(tmp_path) as (publisher, listener, client):
        client.send_multipart([b"", b"12"])
        client.send_multipart([b"", b"", b"", b""])
        publisher.publish([event(1)])
        heard = live(listener, 1)
        assert replay(client, heard[-1][0]) == heard[-1:]


def test_an_index_of_events_is_what_the_cache_holds(tmp_path: Path) -> None:
    with publishing(tmp_path) as (publisher, listener, _):
        it = scheduler(num_blocks=4)
        index = KVIndex()
        for prompt in ([1] * 9, [2] * 9, [1] * 4 + [3] * 9):
            it.add(AddRequest("a", prompt, SamplingParams(max_tokens=1), 0.0))
            while it.has_work:
                plan = it.plan()
                it.commit(plan, StepResult([[7] if at.wants == "token" else [] for at in plan.scheduled]))
            publisher.publish(it.take_kv_events())
        publisher.publish([event(-1)])
        for _, payload in live(listener, -1)[:-1]:
            index.apply(decode(payload))
        assert len(index.blocks) == it.pool.num_remembered
        assert (0, hash_of([1] * 4 + [3] * 8, 4)) in index.blocks


def test_the_engines_of_a_server_have_endpoints_of_their_own() -> None:
    assert endpoint_of("tcp://*:5557", 0) == "tcp://*:5557"
    assert endpoint_of("tcp://*:5557", 2) == "tcp://*:5559"
    assert endpoint_of("tcp://127.0.0.1:*", 2) == "tcp://127.0.0.1:*"
    assert endpoint_of("ipc:///run/events", 2) == "ipc:///run/events_dp2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "inproc://events"}, "'inproc://events' is no endpoint such as tcp://"),
        ({"endpoint": "ipc:///nowhere/at/all"}, "ipc:///nowhere/at/all can't be bound: "),
        ({"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "ipc:///nowhere/x"}, "ipc:///nowhere/x can't be bound"),
        ({"endpoint": "tcp://127.0.0.1"}, "tcp://127.0.0.1 can't be connected to: "),
    ],
)
def test_an_endpoint_that_can_t_be_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVEventPublisher(KVEventsConfig(enable_kv_cache_events=True, **options))


def test_events_without_a_prefix_cache_are_refused() -> None:
    on = KVEventsConfig(enable_kv_cache_events=True)
    check_limits(EngineConfig(model="m", kv_events_config=on))
    check_limits(EngineConfig(model="m", kv_events_config=KVEventsConfig(), enable_prefix_caching=False))
    with pytest.raises(ValueError, match="without a prefix cache there is nothing to tell"):
        check_limits(EngineConfig(model="m", kv_events_config=on, enable_prefix_caching=False))
