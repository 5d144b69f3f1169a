"""Orders over TCP: all of them, in order, or an error; never one in the place of another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import zmq

from octavo.runtime.parallel.address import Address, KeyPair, bind, key_pair, prepare
from octavo.runtime.parallel.tcp_channel import TcpDriverChannel, TcpFollowerChannel

SECRET = key_pair("a secret of the cluster")


class Reasons:
    """Why all waiting ends; None: it doesn't."""

    def __init__(self) -> None:
        self.why: str | None = None

    def __call__(self) -> str | None:
        return self.why


@pytest.fixture(params=[None, SECRET], ids=["without a key", "with one"])
def pair(request: pytest.FixtureRequest) -> KeyPair | None:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def why() -> Reasons:
    return Reasons()


Follow = Callable[[int], TcpFollowerChannel]


@pytest.fixture
def follow(driver: TcpDriverChannel, pair: KeyPair | None) -> Iterator[Follow]:
    """Opens the end of a follower."""
    opened: list[TcpFollowerChannel] = []

    def open_end(rank: int) -> TcpFollowerChannel:
        opened.append(TcpFollowerChannel(driver.address, pair, rank))
        return opened[-1]

    yield open_end
    for channel in opened:
        channel.close()


@pytest.fixture
def driver(pair: KeyPair | None, why: Reasons) -> Iterator[TcpDriverChannel]:
    channel = TcpDriverChannel("127.0.0.1", pair, [1, 3], why)
    yield channel
    channel.close()


def test_all_orders_come_in_order(driver: TcpDriverChannel, follow: Follow) -> None:
    """Also those that were sent while nobody read: more than a network's buffers hold."""
    followers = [follow(rank) for rank in (1, 3)]
    driver.open()
    for number in range(100):
        driver.send(np.full(number * 1000, number, np.int32))
    for follower in followers:
        for number in range(100):
            order = follower.receive()
            assert order is not None
            assert order.tolist() == [number] * (number * 1000)


def test_nothing_is_ordered_before_all_are_there(driver: TcpDriverChannel, follow: Follow, why: Reasons) -> None:
    follow(1)
    timer = threading.Timer(0.2, setattr, (why, "why", "rank 3 of 4 has not come"))
    timer.start()
    with pytest.raises(RuntimeError, match="rank 3 of 4 has not come"):
        driver.open()
    timer.join()


@pytest.mark.parametrize("pair", [None], indirect=True)
def test_a_stranger_is_no_follower(driver: TcpDriverChannel, follow: Follow) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(driver.address.url)
        stranger.send_multipart([b"a", b"b"])
        with stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
            assert monitor.poll(20_000)
            stranger.disable_monitor()
        followers = [follow(rank) for rank in (1, 3)]
        driver.open()
        driver.send(np.arange(3, dtype=np.int32))
        assert [follower.receive().tolist() for follower in followers] == [[0, 1, 2]] * 2  # type: ignore[union-attr]
        assert not stranger.poll(0)
        stranger.close(linger=0)


def test_an_order_to_a_follower_that_has_left_is_an_error(driver: TcpDriverChannel, follow: Follow) -> None:
    followers = [follow(rank) for rank in (1, 3)]
    driver.open()
    followers[1].close()

    def send_until_noticed() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            driver.send(np.zeros(4, np.int32))
            time.sleep(0.01)

    with pytest.raises(RuntimeError, match="rank 3 has left the channel of orders"):
        send_until_noticed()


def test_a_follower_that_missed_an_order_ends(pair: KeyPair | None) -> None:
    """Its connection broke and was made anew, and with the old one an order was lost."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as driver:
        prepare(driver, pair, is_server=True)
        follower = TcpFollowerChannel(bind(driver, Address("127.0.0.1", 0), ""), pair, 1)
        identity, _ = driver.recv_multipart()
        for number in (0, 2):
            driver.send_multipart([identity, number.to_bytes(8, "big"), np.zeros(1, np.int32).tobytes()])
        assert follower.receive() is not None
        with pytest.raises(RuntimeError, match=r"order 1 of .* is lost: number 2 has come instead"):
            follower.receive()
        follower.close()
