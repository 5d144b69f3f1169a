"""A member's end of a meeting (meeting.py): it joins, beats for as long as it lives, and learns when all is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from octavo.runtime.parallel.address import KEY, Address, KeyPair, prepare
from octavo.runtime.parallel.lifeline import EndedError
from octavo.runtime.parallel.meeting import (
    ARRIVAL,
    Alive,
    Beat,
    Bye,
    FromMeeting,
    Get,
    Hello,
    Left,
    Put,
    Refused,
    ToMeeting,
    Value,
    Wait,
    Welcome,
    beat_seconds,
)

RETRY_SECONDS = 0.5
CONNECT_SECONDS = 0.02  # between two looks at whether there is a connection
POLL_SECONDS = 0.2
LOOK_SECONDS = 0.05  # between two looks at whether there is a value
LAST_WORDS_SECONDS = 2.0
FLUSH_MS = 200
REFUSALS = 3  # one may be a process that ended at that moment


class JoinError(ValueError):
    """A meeting can't be joined; the message says why."""


class Guest:
    """One member. Its socket belongs to whichever of `join` and the thread of `watch` is running."""

    def __init__(self, address: Address, pair: KeyPair | None, hello: Hello, patience: float) -> None:
        self._hello = hello
        self._patience = patience
        self._address = address
        self._line = Line(address, pair)

    def join(self) -> bytes:
        """Come, and wait for a place: the details of the welcome. Raises JoinError."""
        limit = ARRIVAL * self._patience
        deadline = time.monotonic() + limit
        why = "nobody answers"
        while time.monotonic() < deadline:
            answer = self._line.ask(self._hello, RETRY_SECONDS)
            match answer:
                case Welcome(details):
                    return details
                case Refused(why):
                    break
                case Wait(why):
                    time.sleep(RETRY_SECONDS)
            if self._line.num_refusals >= REFUSALS:
                why = (
                    f"{self._address} doesn't let this machine in: its {KEY} is another one, or only one of both has it"
                )
                break
        else:
            why = f"there was no place at {self._address} within {limit:g} s: {why}"
        self.close()
        raise JoinError(why)

    def watch(self, on_over: Callable[[Bye], None]) -> None:
        """Beat from now on; on_over is called once, in another thread, when the meeting is over or silent."""

        def beat() -> None:
            bye = self._beat()
            self.close()
            on_over(bye)

        threading.Thread(target=beat, name="octavo-beats", daemon=True).start()

    def close(self) -> None:
        """Go without a word; not after `watch`."""
        self._line.close()

    def _beat(self) -> Bye:
        beat = beat_seconds(self._patience)
        missed = 0
        while missed * beat <= self._patience:
            answer = self._line.ask(Beat(self._hello.guest), beat)
            missed = missed + 1 if answer is None else 0
            if answer is not None and not isinstance(answer, Bye):
                answer = self._line.hear(beat)
            if isinstance(answer, Bye):
                self._line.ask(Left(self._hello.guest, answer.why), 0.0)
                return answer
        return Bye(f"{self._address} has not been heard of for {self._patience:g} s (--distributed-timeout-seconds)")


class Line:
    """A socket to a meeting, for one thread at a time.

    num_refusals: connections in a row that the other end has ended during the handshake, as it does with a wrong key.
    """

    def __init__(self, address: Address, pair: KeyPair | None) -> None:
        self.num_refusals = 0
        self._address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        prepare(self._socket, pair)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # what is said while nobody is there is not kept
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromMeeting] = msgspec.msgpack.Decoder(FromMeeting)
        self._socket.connect(address.url)

    def ask(self, message: ToMeeting, seconds: float) -> FromMeeting | None:
        """Say something, and wait for the answer; None where none has come in time, or it could not be said."""
        deadline = time.monotonic() + seconds
        frame = self._encoder.encode(message)
        while True:
            try:
                self._socket.send(frame, zmq.NOBLOCK)
                break
            except zmq.Again:
                self._count_refusals()
                if time.monotonic() >= deadline:
                    return None
                time.sleep(CONNECT_SECONDS)
        answer = self.hear(deadline - time.monotonic())
        if answer is None:  # a connection takes what is sent to it before the other end refuses it
            self._count_refusals()
        return answer

    def hear(self, seconds: float) -> FromMeeting | None:
        """Wait for what comes unasked."""
        if not self._socket.poll(max(0, int(1000 * seconds))):
            return None
        try:
            return self._decoder.decode(self._socket.recv())
        except msgspec.DecodeError as error:
            return Refused(f"what listens at {self._address} can't be read: {error}")

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=FLUSH_MS)
        self._context.term()

    def _count_refusals(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.num_refusals = 0
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self.num_refusals += 1
            else:  # it is certain, and libzmq doesn't connect again: one end with a key has told one without
                self.num_refusals = REFUSALS


class Values:
    """What the processes of a meeting's members keep for each other. why: of the end of all waiting; None before."""

    def __init__(self, address: Address, pair: KeyPair | None, why: Callable[[], str | None]) -> None:
        self._line = Line(address, pair)
        self._why = why

    def put(self, key: str, value: bytes) -> None:
        """Raises EndedError."""
        while not isinstance(self._line.ask(Put(key, value), POLL_SECONDS), Alive):
            self._check()

    def get(self, key: str) -> bytes:
        """Wait until there is a value. Raises EndedError."""
        while True:
            answer = self._line.ask(Get(key), POLL_SECONDS)
            if isinstance(answer, Value) and answer.key == key:  # and not the late answer to another question
                return answer.value
            self._check()
            if answer is not None:
                time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        self._line.close()

    def _check(self) -> None:
        why = self._why()
        if why is not None:
            raise EndedError(why)


def leave(address: Address, pair: KeyPair | None, guest: str, why: str) -> None:
    """Tell a meeting that a guest, who can't say it himself, has ended; it may be over."""
    line = Line(address, pair)
    line.ask(Left(guest, why), LAST_WORDS_SECONDS)
    line.close()
