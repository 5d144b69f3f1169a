"""The engine's end of the socket between it and the server."""

from __future__ import annotations

import msgspec
import zmq

from octavo.runtime.messages import FromEngine, ToEngine, TokenOutput

MAX_BYTES = 1 << 20  # of messages that are read at a time: some milliseconds; the next ones are read after a step
FLUSH_MS = 2000  # how long the last message may take to leave
_POLLIN = int(zmq.POLLIN)


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Whether `recv` would bring one. To be told by zmq.Again takes several times as long: it imports and formats."""
    events: int = socket.get(zmq.EVENTS)  # type: ignore[assignment]
    return bool(events & _POLLIN)


class Link:
    """The engine's end of the socket, with messages as values. Queues are unbounded: nothing is ever dropped."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.set_hwm(0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self.socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)

    def wake_for(self, source: int | zmq.Socket[bytes]) -> None:
        """Take a file descriptor, or another socket, that is readable for a message that has come."""
        self._poller.register(source, zmq.POLLIN)

    def comes_before(self, descriptor: int) -> bool:
        """Wait until there is a message or a file descriptor is readable. Returns whether the message came first."""
        self._poller.register(descriptor, zmq.POLLIN)
        ready = dict(self._poller.poll())
        return descriptor not in ready

    def send(self, message: FromEngine) -> None:
        self.socket.send(self._encoder.encode(message))

    def wait(self) -> None:
        """Sleep until there is a message or a descriptor is readable; no step is under way, so its own is silent."""
        self._poller.poll()

    def receive(self) -> list[ToEngine | TokenOutput]:
        """Messages that have arrived, up to MAX_BYTES of them. An unreadable request becomes its error output."""
        messages: list[ToEngine | TokenOutput] = []
        num_bytes = 0
        while num_bytes < MAX_BYTES and has_message(self.socket):
            frame = self.socket.recv(zmq.NOBLOCK)
            messages.append(self._decode(frame))
            num_bytes += len(frame)
        return messages

    def _decode(self, frame: bytes) -> ToEngine | TokenOutput:
        try:
            message: ToEngine = self._decoder.decode(frame)
        except msgspec.ValidationError as error:
            fields = msgspec.msgpack.decode(frame)
            if not isinstance(fields, dict) or not isinstance(fields.get("request_id"), str):
                raise
            return TokenOutput(fields["request_id"], [], finish_reason="error", error=f"bad request: {error}")
        return message

    def close(self) -> None:
        self.socket.close(linger=FLUSH_MS)
