"""Where processes of several machines meet: one listens, the others come as members, and each end watches the other.

A member says Hello with what it means (agreement.py), and is welcomed, told to wait, or refused for good. Then it
beats; the answer to each beat says that the meeting goes on, or Bye. Either end that hears nothing for the patience
takes the other for lost. Processes of members also keep values for each other here (Put, Get), by which gloo finds its
peers.

Whatever comes of a guest that this meeting doesn't know is answered with Bye: it belongs to an earlier meeting, whose
process has died, or has been given up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import zmq

from octavo.runtime.link import has_message
from octavo.runtime.parallel.address import KEY, Address, KeyPair, bind, prepare
from octavo.runtime.parallel.agreement import Agreement, difference

log = logging.getLogger(__name__)

LONGEST_BEAT = 1.0  # seconds between two beats, at most
BEATS = 10  # in the patience, at least; missed ones are counted, so that a process that was stopped sees no silence
DOUBT = 3  # missed beats after which a newcomer gets the place of a silent guest
ARRIVAL = 10  # times the patience may pass before a member has come, since machines start at different times
POLL_MS = 100
FLUSH_SECONDS = 0.5  # that the last words may take
MAX_MESSAGE = 1 << 20  # bytes; a connection that brings more is ended
REPEAT_SECONDS = 60.0  # between two lines about connections with another key


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """guest: a name that nobody else has. node: for people, such as 'node 1 (10.0.0.2)'."""

    member: int
    guest: str
    node: str
    means: Agreement


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """details: what the owner of the meeting tells this member."""

    details: bytes


class Wait(msgspec.Struct, frozen=True, tag="wait"):
    """Come again a little later: somebody else has this place, and may be about to lose it."""

    why: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """There is no use in coming again."""

    why: str


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    guest: str


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The answer to what needs no other one."""


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The meeting is over for this guest. is_final: no other one follows."""

    why: str
    is_final: bool = False


class Left(msgspec.Struct, frozen=True, tag="left"):
    """This guest has ended, says whoever started it; or it has heard a Bye, and says so itself."""

    guest: str
    why: str


class Put(msgspec.Struct, frozen=True, tag="put"):
    key: str
    value: bytes


class Get(msgspec.Struct, frozen=True, tag="get"):
    """Answered with the value, or Alive while there is none."""

    key: str


class Value(msgspec.Struct, frozen=True, tag="value"):
    key: str
    value: bytes


ToMeeting = Hello | Beat | Left | Put | Get
FromMeeting = Welcome | Wait | Refused | Alive | Bye | Value


@dataclass
class _Member:
    """A place in a meeting. guest: who has it; '' while nobody does. missed: beats, or those before anybody came."""

    number: int
    name: str
    guest: str = ""
    node: str = ""
    identity: bytes = b""  # of the socket that beats
    missed: int = 0
    has_come: bool = False

    @property
    def who(self) -> str:
        """The member, and the machine that it is on, for errors."""
        return f"{self.name} on {self.node}" if self.node else self.name


@dataclass(frozen=True)
class Owner:
    """What whoever owns a meeting is asked and told, in the meeting's thread.

    welcome  a member comes: the details that it is told; None where it must wait for another meeting
    lost     a member is gone, or has not come in time
    refused  who comes for a place that nobody has means something else
    """

    welcome: Callable[[int, str], bytes | None]
    lost: Callable[[int, str], None]
    refused: Callable[[int, str], None]


class Meeting:
    """The end that listens: a thread of its own answers until `close`.

    members: names by their numbers, such as 'rank 2 of 4'. flags: which the address comes from, for errors. Raises
    ValueError where the address can't be had.
    """

    def __init__(
        self,
        address: Address,
        pair: KeyPair | None,
        members: Mapping[int, str],
        means: Agreement,
        patience: float,
        owner: Owner,
        flags: str,
    ) -> None:
        self._members = {number: _Member(number, name) for number, name in members.items()}
        self._means = means
        self._patience = patience
        self._owner = owner
        self._values: dict[str, bytes] = {}
        self._bye: Bye | None = None
        self._last_warning = -REPEAT_SECONDS
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToMeeting] = msgspec.msgpack.Decoder(ToMeeting)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        prepare(self._socket, pair, is_server=True)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  # a guest that sees first that keys differ hangs up
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        try:
            self.address = bind(self._socket, address, flags)
        except ValueError:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._run, name="octavo-meeting", daemon=True)
        self._thread.start()

    def close(self, why: str, *, is_final: bool = False) -> None:
        """Tell all members, and listen no more. May be called again."""
        self._bye = self._bye or Bye(why, is_final)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        beat = beat_seconds(self._patience)
        next_beat = time.monotonic() + beat
        while self._bye is None:
            ready = dict(poller.poll(int(min(POLL_MS, 1000 * beat))))
            if self._monitor in ready:
                self._monitor.recv_multipart()
                self._warn_of_strangers()
            while self._bye is None and has_message(self._socket):
                self._take(*self._receive())
            if time.monotonic() >= next_beat:
                self._count_missed(beat)
                next_beat = time.monotonic() + beat
        self._say(self._bye)
        self._close_sockets()

    def _say(self, bye: Bye) -> None:
        """Tell all members, and wait until they have heard it: a connection that is closed over what it has not read
        takes with it what it has sent.
        """
        waiting = {member.guest: member.identity for member in self._members.values() if member.guest}
        for identity in waiting.values():
            self._send(identity, bye)
        deadline = time.monotonic() + FLUSH_SECONDS
        while waiting and self._socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            _, message = self._receive()
            if isinstance(message, Left):
                waiting.pop(message.guest, None)

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=int(1000 * FLUSH_SECONDS))
        self._context.term()

    def _receive(self) -> tuple[bytes, ToMeeting | msgspec.DecodeError]:
        """Who has said something, and what, or why that can't be read."""
        identity, *frames = self._socket.recv_multipart()
        try:
            return identity, self._decoder.decode(b"".join(frames))
        except msgspec.DecodeError as error:
            return identity, error

    def _send(self, identity: bytes, message: FromMeeting) -> None:
        self._socket.send_multipart([identity, self._encoder.encode(message)])

    def _warn_of_strangers(self) -> None:
        now = time.monotonic()
        if now - self._last_warning >= REPEAT_SECONDS:
            self._last_warning = now
            log.warning(
                "%s: a connection ended in its handshake: it has another %s or none, or is no octavo", self.address, KEY
            )

    def _take(self, identity: bytes, message: ToMeeting | msgspec.DecodeError) -> None:
        match message:
            case msgspec.DecodeError():
                listens = f"octavo {self._means.version} listens at {self.address}"
                self._send(identity, Refused(f"{listens}, and can't read this: {message}"))
            case Hello():
                self._send(identity, self._greet(identity, message))
            case Beat():
                member = self._member_of(message.guest)
                if member is not None:
                    member.missed = 0
                    member.identity = identity
                known = member is not None
                self._send(identity, Alive() if known else Bye("the one that it has joined is no more"))
            case Left():
                self._send(identity, Alive())
                self._lose(message.guest, message.why)
            case Put():
                self._values[message.key] = message.value
                self._send(identity, Alive())
            case Get():
                value = self._values.get(message.key)
                self._send(identity, Alive() if value is None else Value(message.key, value))

    def _member_of(self, guest: str) -> _Member | None:
        return next((one for one in self._members.values() if guest and one.guest == guest), None)

    def _greet(self, identity: bytes, hello: Hello) -> FromMeeting:
        member = self._members.get(hello.member)
        if member is None:
            return Refused(f"{hello.node} comes as number {hello.member}, and there is no such place at {self.address}")
        problem = difference(self._means, hello.means, ("node 0", hello.node))
        if problem is not None:
            if not member.guest:  # else somebody who means the same has this place
                self._owner.refused(hello.member, problem)
            return Refused(problem)
        if member.guest not in ("", hello.guest):
            if member.missed < DOUBT:
                return Wait(f"{member.who} is there already")
            self._lose(member.guest, f"{member.who} has been silent, and started again")
        details = self._owner.welcome(hello.member, hello.node)
        if details is None:
            return Wait(f"{member.who} has just ended")
        member.guest = hello.guest
        member.node = hello.node
        member.identity = identity
        member.missed = 0
        member.has_come = True
        return Welcome(details)

    def _lose(self, guest: str, why: str) -> None:
        member = self._member_of(guest)
        if member is not None:
            member.guest = ""
            self._owner.lost(member.number, why)

    def _count_missed(self, beat: float) -> None:
        for member in self._members.values():
            member.missed += 1
            silence = member.missed * beat
            if member.guest and silence > self._patience:
                self._lose(
                    member.guest,
                    f"{member.who} has not been heard of for {self._patience:g} s (--distributed-timeout-seconds)",
                )
            elif not member.has_come and silence > ARRIVAL * self._patience:
                member.has_come = True  # told once
                limit = ARRIVAL * self._patience
                self._owner.lost(member.number, f"{member.who} has not come to {self.address} within {limit:g} s")


def beat_seconds(patience: float) -> float:
    """The time between two beats."""
    return min(LONGEST_BEAT, patience / BEATS)
