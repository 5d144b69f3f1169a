"""What the parent process and its server processes tell each other, over a socket pair that is the child's stdin.

A frame (octavo.text.frames) is one message in msgpack. The end of the socket is the end of the other process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Generic, TypeVar

import msgspec

from octavo.runtime.messages import Ready
from octavo.server.lora_options import LoraModule
from octavo.text.frames import LENGTH_BYTES, frame_of


class EngineUp(msgspec.Struct, frozen=True, tag="engine_up"):
    """This engine's process can serve."""

    index: int
    ready: Ready


class EngineDown(msgspec.Struct, frozen=True, tag="engine_down"):
    """This engine's process is dead, and why. delay: seconds until it is started again; None: it is not."""

    index: int
    message: str
    delay: float | None


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Give this engine no more requests, and say Drained when there are none of yours left."""

    index: int


class Pausing(msgspec.Struct, frozen=True, tag="pausing"):
    """Whether every process lets no new request begin, and whether open ones stand still."""

    is_paused: bool
    stands_still: bool


class AdaptersServed(msgspec.Struct, frozen=True, tag="adapters_served"):
    """The adapters that every process serves now."""

    modules: tuple[LoraModule, ...]


class Serve(msgspec.Struct, frozen=True, tag="serve"):
    """Take connections."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """A signal has come: finish what is under way, and end."""

    number: int


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Say the same, so that it is known that your event loop turns."""


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """This process could serve."""


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """This process can't serve, and why."""

    message: str


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """This engine has nothing of this process's, and gets nothing, until its process has been replaced."""

    index: int


ToServer = EngineUp | EngineDown | Drain | Pausing | AdaptersServed | Serve | Stop | Beat
ToParent = Prepared | Unable | Drain | Drained | Pausing | AdaptersServed | Beat
Heard = TypeVar("Heard", ToServer, ToParent)


class Words(Generic[Heard]):
    """One end. Use from one event loop only. kind: of what is heard."""

    def __init__(self, own: socket.socket, kind: object) -> None:
        self._socket = own
        self._decoder: msgspec.msgpack.Decoder[Heard] = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._unsaid: list[bytes] = []

    async def open(self) -> None:
        """What was said before is sent now."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        for frame in self._unsaid:
            self._writer.write(frame)
        self._unsaid.clear()

    def say(self, word: ToServer | ToParent) -> None:
        """Send it; it is lost where the other process has ended."""
        frame = frame_of(self._encoder.encode(word))
        if self._writer is None:
            self._unsaid.append(frame)
        else:
            self._writer.write(frame)

    async def hear(self) -> Heard | None:
        """The next one; None when the other process has ended."""
        assert self._reader is not None
        try:
            size = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
            return self._decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def close(self) -> None:
        """Let the other process know that this one is done with it."""
        if self._writer is None:
            self._socket.close()
            return
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and its transports with it
            self._writer.close()
