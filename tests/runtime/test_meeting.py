"""Processes of several machines meet, watch each other, and let nobody in who has another key."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from octavo_server import wait_until

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.address import Address, bind, key_for, key_pair, master_address, prepare
from octavo.runtime.parallel.agreement import Agreement, agreement_of, difference
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.guest import POLL_SECONDS, Guest, JoinError, Values, leave
from octavo.runtime.parallel.meeting import Bye, FromMeeting, Get, Hello, Meeting, Owner, Refused, Welcome

LOOPBACK = Address("127.0.0.1", 0)
MEANS = Agreement("1.0", {"config.json": "abc"}, {"--block-size": "16"})
SECRET = key_pair("a secret of the cluster")
ENDED = "a connection ended in its handshake: it has another OCTAVO_CLUSTER_KEY or none, or is no octavo"


class Host:
    """A meeting of two places, and what its owner is told."""

    def __init__(self, patience: float = 1.0, pair: object = SECRET) -> None:
        self.told: queue.SimpleQueue[tuple[str, int, str]] = queue.SimpleQueue()
        owner = Owner(
            lambda member, node: f"{member} from {node}".encode(),
            lambda member, why: self.told.put(("lost", member, why)),
            lambda member, why: self.told.put(("refused", member, why)),
        )
        self.silent: list[Guest] = []  # that never beat
        self.pair = pair
        self.patience = patience
        self.meeting = Meeting(
            LOOPBACK, pair, {1: "rank 1 of 3", 2: "rank 2 of 3"}, MEANS, patience, owner, "--master-addr"
        )  # type: ignore[arg-type]

    def guest(self, member: int = 1, name: str = "a", means: Agreement = MEANS, pair: object = SECRET) -> Guest:
        hello = Hello(member, name, "node 1 (10.0.0.2)", means)
        return Guest(self.meeting.address, pair, hello, self.patience)  # type: ignore[arg-type]

    def silent_guest(self, member: int = 1, name: str = "a") -> Guest:
        self.silent.append(self.guest(member, name))
        return self.silent[-1]

    def hears(self) -> tuple[str, int, str]:
        return self.told.get(timeout=20)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def open_host() -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def opened(*arguments: object, **named: object) -> Host:
        hosts.append(Host(*arguments, **named))  # type: ignore[arg-type]
        return hosts[-1]

    yield opened
    for host in hosts:
        for guest in host.silent:
            guest.close()
        host.meeting.close("the test is over")


def test_a_member_is_welcomed_and_told_of_the_end(open_host: Callable[..., Host]) -> None:
    host = open_host()
    guest = host.guest()
    assert guest.join() == b"1 from node 1 (10.0.0.2)"
    byes: queue.SimpleQueue[Bye] = queue.SimpleQueue()
    guest.watch(byes.put)
    time.sleep(0.3)
    assert byes.empty()
    host.meeting.close("the server has ended", is_final=True)
    assert byes.get(timeout=20) == Bye("the server has ended", is_final=True)


def test_a_member_that_falls_silent_is_lost(open_host: Callable[..., Host]) -> None:
    host = open_host(0.4)
    host.silent_guest().join()
    kind, member, why = host.hears()
    assert (kind, member) == ("lost", 1)
    assert why == ("rank 1 of 3 on node 1 (10.0.0.2) has not been heard of for 0.4 s (--distributed-timeout-seconds)")


def test_a_silent_member_is_lost_however_much_others_say(open_host: Callable[..., Host]) -> None:
    """As the beats of many ranks do."""
    host = open_host(0.4)
    host.silent_guest().join()
    values = Values(host.meeting.address, SECRET, lambda: None)
    is_over = threading.Event()

    def talk() -> None:
        while not is_over.is_set():
            values.put("key", b"1")

    talking = threading.Thread(target=talk)
    talking.start()
    try:
        assert host.hears()[:2] == ("lost", 1)
    finally:
        is_over.set()
        talking.join()
        values.close()


def test_a_member_that_never_comes_is_told_of(open_host: Callable[..., Host]) -> None:
    host = open_host(0.1)
    told = {host.hears()[1:], host.hears()[1:]}
    assert {member for member, _ in told} == {1, 2}
    assert {why for _, why in told} == {
        f"rank {member} of 3 has not come to {host.meeting.address} within 1 s" for member in (1, 2)
    }


def test_a_host_that_falls_silent_is_over_and_one_that_starts_anew_knows_nobody(free_port: int) -> None:
    """The first host welcomes two members, and is never heard again: its machine is off, say."""
    address = Address("127.0.0.1", free_port)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as host:
        prepare(host, SECRET, is_server=True)
        bind(host, address, "--master-addr")
        guests: list[Guest] = []
        byes: list[queue.SimpleQueue[Bye]] = [queue.SimpleQueue(), queue.SimpleQueue()]
        for member, patience in enumerate((0.4, 60.0)):
            guest = Guest(address, SECRET, Hello(member, str(member), "node 1", MEANS), patience)
            let_in(guest, host)
            guests.append(guest)
        for guest, told in zip(guests, byes, strict=True):
            guest.watch(told.put)
        silent = byes[0].get(timeout=20)
        assert silent == Bye(f"{address} has not been heard of for 0.4 s (--distributed-timeout-seconds)")
    owner = Owner(lambda *_: b"", lambda *_: None, lambda *_: None)
    anew = Meeting(address, SECRET, {1: "rank 1 of 2"}, MEANS, 60.0, owner, "--master-addr")
    assert byes[1].get(timeout=20) == Bye("the one that it has joined is no more")
    anew.close("the test is over")


def let_in(guest: Guest, host: zmq.Socket[bytes]) -> None:
    joining = threading.Thread(target=guest.join)
    joining.start()
    identity, _ = host.recv_multipart()
    host.send_multipart([identity, msgspec.msgpack.encode(Welcome(b""))])
    joining.join()


def test_a_host_in_whose_place_something_hangs_up_is_waited_for(free_port: int) -> None:
    """A proxy, say, which takes connections while the host is made anew: for as long as the patience lasts."""
    address = Address("127.0.0.1", free_port)
    guest = Guest(address, SECRET, Hello(1, "a", "node 1", MEANS), 2.0)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as host:
        prepare(host, SECRET, is_server=True)
        bind(host, address, "--master-addr")
        let_in(guest, host)
    byes: queue.SimpleQueue[tuple[float, Bye]] = queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", free_port)) as proxy:
        proxy.settimeout(0.05)
        begin = time.monotonic()
        guest.watch(lambda bye: byes.put((time.monotonic(), bye)))
        while byes.empty():
            with contextlib.suppress(TimeoutError):
                proxy.accept()[0].close()
    end, bye = byes.get()
    assert bye == Bye(f"{address} has not been heard of for 2 s (--distributed-timeout-seconds)")
    assert end - begin >= 2.0


@pytest.mark.parametrize(
    ("host_key", "guest_key"), [(SECRET, key_pair("another secret of a cluster")), (SECRET, None), (None, SECRET)]
)
def test_another_key_or_none_is_refused_at_once(
    open_host: Callable[..., Host], caplog: pytest.LogCaptureFixture, host_key: object, guest_key: object
) -> None:
    host = open_host(60.0, host_key)
    begin = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(JoinError, match="doesn't let this machine in: its OCTAVO_CLUSTER_KEY is another one"),
    ):
        host.guest(pair=guest_key).join()
    assert time.monotonic() - begin < 30, "it must not wait until the patience is over"
    assert host.told.empty(), "a stranger can't end the meeting"
    wait_until(lambda: ENDED in caplog.text)
    guest = host.guest(pair=host_key)
    assert guest.join(), "whoever has the key is let in"
    guest.close()


def test_the_host_says_when_a_stranger_hangs_up(
    open_host: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    """As guests do that see first that keys differ, before the host can see it."""
    host = open_host(60.0)
    with caplog.at_level(logging.WARNING):
        socket.create_connection(("127.0.0.1", host.meeting.address.port)).close()
        wait_until(lambda: ENDED in caplog.text)


def test_who_means_something_else_is_refused_on_both_sides(open_host: Callable[..., Host]) -> None:
    host = open_host()
    other = msgspec.structs.replace(MEANS, options={"--block-size": "32"}, files={})
    with pytest.raises(JoinError) as refused:
        host.guest(means=other).join()
    kind, member, why = host.hears()
    assert (kind, member, why) == ("refused", 1, str(refused.value))
    assert why == (
        "node 1 (10.0.0.2) doesn't mean the same as node 0: config.json is abc on node 0 and missing on "
        "node 1 (10.0.0.2); --block-size is 16 on node 0 and 32 on node 1 (10.0.0.2)"
    )


def test_who_means_something_else_ends_no_engine_that_runs(open_host: Callable[..., Host]) -> None:
    """A machine that was started a second time, with other options."""
    host = open_host(60.0)
    host.silent_guest().join()
    with pytest.raises(JoinError, match="doesn't mean the same as node 0: octavo is"):
        host.guest(name="b", means=msgspec.structs.replace(MEANS, version="2.0")).join()
    assert host.told.empty()


def test_a_place_that_is_taken_is_waited_for(open_host: Callable[..., Host]) -> None:
    """Until whoever has it falls silent; a newcomer says that it has been started again."""
    host = open_host(2.0)
    first = host.guest()
    first.join()
    assert host.silent_guest(name="b").join() == b"1 from node 1 (10.0.0.2)"
    assert host.hears() == ("lost", 1, "rank 1 of 3 on node 1 (10.0.0.2) has been silent, and started again")
    byes: queue.SimpleQueue[Bye] = queue.SimpleQueue()
    first.watch(byes.put)
    assert not byes.get(timeout=20).is_final


def test_whoever_started_a_member_tells_how_it_ended(open_host: Callable[..., Host]) -> None:
    host = open_host()
    host.silent_guest().join()
    leave(host.meeting.address, SECRET, "nobody", "of an earlier meeting")
    leave(host.meeting.address, SECRET, "a", "rank 1 of 3 ended (killed by signal 9)")
    assert host.hears() == ("lost", 1, "rank 1 of 3 ended (killed by signal 9)")


TOO_LONG = [b"x" * (2 << 20)]
JUNK = [[b"\xc1"], [b""], [b"a", b"b", b"c"], [b"\x80"], [msgspec.msgpack.encode({"type": "nobody"})], TOO_LONG]


@contextlib.contextmanager
def stranger(address: Address) -> Iterator[None]:
    """Somebody at the meeting's port who speaks ZeroMQ, and nothing else that is known there."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as line:
        prepare(line, None)
        line.connect(address.url)
        for frames in JUNK:
            line.send_multipart(frames)
            if frames is not TOO_LONG:
                assert line.poll(20_000), frames
                assert isinstance(msgspec.msgpack.decode(line.recv(), type=FromMeeting), Refused)
        yield
        line.send_multipart(JUNK[2])
        line.close(linger=0)


def test_junk_ends_no_meeting(open_host: Callable[..., Host]) -> None:
    """Before anybody has come, and while it says its last words."""
    host = open_host(pair=None)
    with stranger(host.meeting.address):
        guest = host.guest(pair=None)
        assert guest.join() == b"1 from node 1 (10.0.0.2)"
        over: queue.SimpleQueue[Bye] = queue.SimpleQueue()
        guest.watch(over.put)
    host.meeting.close("the engine has ended")
    assert over.get(timeout=20) == Bye("the engine has ended")


def test_members_keep_values_for_each_other(open_host: Callable[..., Host]) -> None:
    host = open_host()
    reader, writer = (Values(host.meeting.address, SECRET, lambda: None) for _ in range(2))
    writer.put("early", b"1")
    assert reader.get("early") == b"1"
    stopped = Values(host.meeting.address, SECRET, lambda: "rank 2 has ended")
    with pytest.raises(RuntimeError, match="rank 2 has ended"):
        stopped.get("never")
    for values in (reader, writer, stopped):
        values.close()


def test_a_value_that_nobody_could_be_told_at_once_is_kept_all_the_same(free_port: int) -> None:
    """The connection takes longer than one look: a slow network, or a host that is about to listen."""
    address = Address("127.0.0.1", free_port)
    writer = Values(address, SECRET, lambda: None)
    writing = threading.Thread(target=writer.put, args=("key", b"1"), daemon=True)
    writing.start()
    time.sleep(2 * POLL_SECONDS)
    owner = Owner(lambda *_: b"", lambda *_: None, lambda *_: None)
    host = Meeting(address, SECRET, {}, MEANS, 60.0, owner, "--master-addr")
    writing.join(20)
    assert not writing.is_alive()
    assert writer.get("key") == b"1"
    writer.close()
    host.close("the test is over")


def test_a_value_is_waited_for(open_host: Callable[..., Host]) -> None:
    """And what was asked before, and answered late, is not taken for it."""
    host = open_host()
    reader, writer = (Values(host.meeting.address, SECRET, lambda: None) for _ in range(2))
    writer.put("early", b"1")
    assert reader.get("early") == b"1"
    reader._line.ask(Get("early"), 0.0)
    timer = threading.Timer(0.3, writer.put, ("late", b"2"))
    timer.start()
    assert reader.get("late") == b"2"
    timer.join()
    for values in (reader, writer):
        values.close()


def test_what_two_machines_mean(fixtures: Path) -> None:
    """Another place of the files, another number of threads and another node are no differences."""
    config = EngineConfig(model=str(fixtures / "tiny"), parallel=ParallelConfig(nnodes=2, tensor_parallel_size=2))
    there = msgspec.structs.replace(
        config, num_threads=3, parallel=msgspec.structs.replace(config.parallel, node_rank=1, headless=True)
    )
    mine = agreement_of(config)
    assert difference(mine, agreement_of(there), ("node 0", "node 1")) is None
    assert any(name.endswith(".safetensors") for name in mine.files)
    other = msgspec.structs.replace(there, model=str(fixtures / "tiny-qwen2"), max_num_seqs=3)
    assert "config.json is" in str(difference(mine, agreement_of(other), ("node 0", "node 1")))
    parallel = msgspec.structs.replace(there.parallel, tensor_parallel_size=4)
    more = agreement_of(msgspec.structs.replace(there, max_num_seqs=3, parallel=parallel))
    assert difference(mine, more, ("node 0", "node 1")) == (
        "node 1 doesn't mean the same as node 0: --max-num-seqs is 256 on node 0 and 3 on node 1; "
        "--tensor-parallel-size is 2 on node 0 and 4 on node 1"
    )


def test_every_address_but_loopback_wants_a_key() -> None:
    assert key_for(Address("127.0.0.1", 1), {}) is None
    assert key_for(Address("::1", 1), {}) is None
    with pytest.raises(ValueError, match=r"10.0.0.1:1: every address but loopback wants a key, and .* is not set"):
        key_for(Address("10.0.0.1", 1), {})
    with pytest.raises(ValueError, match="has 5 characters"):
        key_for(Address("10.0.0.1", 1), {"OCTAVO_CLUSTER_KEY": "short"})
    pair = key_for(Address("10.0.0.1", 1), {"OCTAVO_CLUSTER_KEY": "x" * 16})
    assert pair == key_pair("x" * 16)
    assert "x" not in repr(pair)


@pytest.mark.parametrize(
    ("master", "address"),
    [
        ("127.0.0.1", "127.0.0.1:29501"),
        ("127.0.0.1:5000", "127.0.0.1:5000"),
        ("::1", "[::1]:29501"),
        ("[::1]:5000", "[::1]:5000"),
    ],
)
def test_the_master_may_have_its_port_behind_a_colon(master: str, address: str) -> None:
    """SGLang's --dist-init-addr."""
    assert str(master_address(ParallelConfig(master_addr=master))) == address


def test_a_name_that_nobody_knows_is_refused_by_its_flag() -> None:
    with pytest.raises(ValueError, match=r"--master-addr no\.such\.host\.invalid: "):
        master_address(ParallelConfig(master_addr="no.such.host.invalid"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_of_all_machines_is_refused_by_its_flag(host: str) -> None:
    """Members would be told to find orders there, and wait for ever at their own machine."""
    with pytest.raises(ValueError, match=f"--master-addr {host}: no address of one machine; the server's own"):
        master_address(ParallelConfig(master_addr=host))


def test_an_address_of_another_machine_is_refused_by_its_flag() -> None:
    owner = Owner(lambda *_: b"", lambda *_: None, lambda *_: None)
    with pytest.raises(ValueError, match=r"--master-addr 192.0.2.1:29501: .*: it must be an address of this machine"):
        Meeting(Address("192.0.2.1", 29501), SECRET, {}, MEANS, 1.0, owner, "--master-addr")
