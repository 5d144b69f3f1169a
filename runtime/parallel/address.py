"""Addresses at which processes of several machines meet, and the key that lets them in.

Both ends of a connection have one CURVE key pair, which they derive from OCTAVO_CLUSTER_KEY. A client has to know the
server's public key before it says anything, and that key never travels, so it is as secret as the key itself: whoever
doesn't have it gets no further than the handshake, and what others say is encrypted.

ZeroMQ and hashlib are imported where a key or a socket is: a server checks addresses before its engines start, and most
have neither.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from octavo.runtime.parallel.config import ParallelConfig

if TYPE_CHECKING:
    import zmq

KEY = "OCTAVO_CLUSTER_KEY"
CONNECT_MS = 3000
LEAST_KEY = 16  # characters: what is derived from a shorter one can be guessed by whoever records a handshake


class Address(msgspec.Struct, frozen=True):
    """host: a number of IP, so that it means the same wherever it is sent."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def url(self) -> str:
        """For ZeroMQ."""
        return f"tcp://{self}"

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback


@dataclass(frozen=True)
class KeyPair:
    """Of CURVE, as ZeroMQ writes it. repr shows neither."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return "KeyPair()"


def resolve(host: str, port: int, flag: str) -> Address:
    """The address of a host by its name. Raises ValueError, which names the flag."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{flag} {host}: {error.strerror or error}") from None
    address = Address(str(found[0][4][0]), port)
    if ipaddress.ip_address(address.host).is_unspecified:  # can be listened at, and not be told to others
        raise ValueError(f"{flag} {host}: no address of one machine; the server's own, at which others reach it, works")
    return address


def master_address(parallel: ParallelConfig) -> Address:
    """Where node 0 listens. Raises ValueError. SGLang's --dist-init-addr has the port behind a colon."""
    host, colon, port = parallel.master_addr.rpartition(":")
    if colon and port.isdigit() and (":" not in host or host.startswith("[")):
        return resolve(host.strip("[]"), int(port), "--master-addr")
    return resolve(parallel.master_addr.strip("[]"), parallel.master_port, "--master-addr")


def engine_address(parallel: ParallelConfig, index: int) -> Address:
    """Where the server meets an engine of another machine. Raises ValueError."""
    port = parallel.data_parallel_rpc_port + index
    return resolve(parallel.data_parallel_address or "", port, "--data-parallel-address")


def own_host_towards(address: Address) -> str:
    """The address of this machine that another one sees, by the route there; nothing is sent. Empty without a route."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address.host, address.port))
        except OSError:  # the cable is cut, and may be mended
            return ""
        return str(probe.getsockname()[0])


def key_pair(secret: str) -> KeyPair:
    """The key pair that a cluster's key means."""
    import hashlib

    import zmq
    from zmq.utils import z85

    derived = z85.encode(hashlib.sha256(secret.encode()).digest())
    return KeyPair(zmq.curve_public(derived), derived)


def key_for(address: Address, environment: Mapping[str, str]) -> KeyPair | None:
    """The pair for this address; None for loopback without a key. Raises ValueError where there has to be one."""
    secret = environment.get(KEY, "")
    if not secret and address.is_loopback:
        return None
    if len(secret) < LEAST_KEY:
        has = f"has {len(secret)} characters" if secret else "is not set"
        raise ValueError(
            f"{address}: every address but loopback wants a key, and {KEY} {has}; give all machines the same one of "
            f"{LEAST_KEY} characters or more, such as that of `openssl rand -hex 32`"
        )
    return key_pair(secret)


def check_addresses(parallel: ParallelConfig, environment: Mapping[str, str]) -> None:
    """Raise ValueError, before anything is started, where other machines are to come and there is no key for them."""
    if parallel.nnodes > 1:
        key_for(master_address(parallel), environment)
    if parallel.data_parallel_address is not None:
        key_for(engine_address(parallel, 0), environment)


def prepare(opened: zmq.Socket[bytes], pair: KeyPair | None, *, is_server: bool = False) -> None:
    """Set a socket up before it is bound or connected. Its queues are unbounded: nothing is dropped."""
    import zmq

    opened.set_hwm(0)
    opened.setsockopt(zmq.IPV6, 1)
    opened.setsockopt(zmq.LINGER, 0)
    opened.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)  # then again: the system's own tries are minutes apart
    if pair is None:
        return
    opened.curve_secretkey = pair.secret
    opened.curve_publickey = pair.public
    if is_server:
        opened.curve_server = True
    else:
        opened.curve_serverkey = pair.public


def bind(opened: zmq.Socket[bytes], address: Address, flags: str) -> Address:
    """Bind a socket; port 0 takes a free one. Returns its address. Raises ValueError, which names the flags."""
    import zmq

    try:
        opened.bind(address.url if address.port else f"tcp://{address}".removesuffix(":0") + ":*")
    except zmq.ZMQError as error:
        hint = ""
        if error.errno == zmq.EADDRNOTAVAIL:
            hint = ": it must be an address of this machine"
        elif error.errno == zmq.EADDRINUSE:
            hint = ": another program has this port"
        raise ValueError(f"{flags} {address}: {zmq.strerror(error.errno or 0)}{hint}") from None
    bound = opened.getsockopt_string(zmq.LAST_ENDPOINT)
    return Address(address.host, int(bound.rpartition(":")[2]))
