"""The socket that a server will listen on: reserved before the model is loaded, opened to clients once it can answer.

A reserved TCP port refuses connections, so that a load balancer sees no server yet, and can't be taken by anybody else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass

BACKLOG = 2048  # connections that wait to be accepted; uvicorn's default
ACCEPTS = 64  # of a turn of the event loop


@dataclass(frozen=True)
class Listener:
    """A reserved socket, and its address for people."""

    socket: socket.socket
    url: str


class BindError(ValueError):
    """The address can't be had; the message names the flags, the reason, and what would work."""


def reserve_port(host: str, port: int) -> socket.socket:
    """A bound TCP socket that doesn't listen yet. Port 0 takes a free port. Raises BindError.

    Linux lets two sockets with SO_REUSEADDR be bound to one port until one of them listens, so this one is bound
    without it. Only where connections of an earlier server linger (TIME_WAIT) does that fail although the port is free;
    then the option is set to bind, and cleared again to keep others away.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise _tcp_error(host, port, error) from None
    bound = socket.socket(family, kind, protocol)
    try:
        try:
            bound.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        bound.close()
        raise _tcp_error(host, port, error) from None
    return bound


def reserve_path(path: str) -> socket.socket:
    """A Unix socket at `path`, which replaces one that a killed server left there. Raises BindError.

    It listens at once: a Unix socket that doesn't listen looks like one whose server is gone, and a second server would
    remove it. Clients that connect while the model is loaded wait.
    """
    bound = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
            raise BindError(f"--uds {path}: Address already in use: a server listens there; another path works")
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        bound.bind(path)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise BindError(f"--uds {path}: {error.strerror or error}") from None
    except BindError:
        bound.close()
        raise
    return bound


def listen(bound: socket.socket) -> None:
    """Open a reserved socket to clients. Raises BindError; uvloop would listen too, but not report a failure."""
    try:
        if bound.family != socket.AF_UNIX:  # its connections inherit this, and the next server can bind at once
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.listen(BACKLOG)
    except OSError as error:
        raise BindError(f"listening on {bound.getsockname()}: {error.strerror}") from None


def handles(listening: socket.socket, num_processes: int = 1) -> list[socket.socket]:
    """The socket as often as connections are to be accepted in one turn of the event loop of this process.

    libuv accepts one of each handle's a turn, and in that turn answers all that the connections so far have asked: of
    500 clients that came together the last ones waited seconds for their first answer.

    None of them blocks, ever: all duplicates share that, those of other processes too, and dup() makes of a socket that
    Python takes for a blocking one a blocking one again. A moment of that, as a server process starts, and another's
    event loop stood in accept until the next client came.
    """
    listening.setblocking(False)
    return [listening, *(listening.dup() for _ in range(max(1, ACCEPTS // num_processes) - 1))]


def _tcp_error(host: str, port: int, error: OSError) -> BindError:
    hint = ""
    if error.errno == errno.EADDRINUSE:
        hint = f": another program has {host}:{port}. Another --port works; --port 0 takes a free one"
    return BindError(f"--host {host} --port {port}: {error.strerror}{hint}")
