"""Who may ask, as values: the API keys, and the names under which the server may be addressed.

Imported before the engine is started, so it imports nothing that is slow. middleware.py applies both.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KEY_VARIABLE = "OCTAVO_API_KEY"
ANY_HOST = "*"


@dataclass(frozen=True)
class Access:
    """No keys: everybody is served. protect_all: /metrics, /version, /docs and /openapi.json need a key too.

    hosts: the Host headers to answer to; `*.name` stands for all names that end in it, ANY_HOST for any.
    """

    keys: tuple[str, ...] = ()
    protect_all: bool = False
    hosts: tuple[str, ...] = (ANY_HOST,)


def api_keys(given: Sequence[str] | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of --api-key, else of OCTAVO_API_KEY; none: everybody is served. Raises ValueError for an unfit one.

    Whitespace around a key, such as the newline at the end of a file, is not part of it: no header could carry it.
    """
    source = "--api-key" if given else KEY_VARIABLE
    if not given:
        given = [environment[KEY_VARIABLE]] if KEY_VARIABLE in environment else []
    keys = tuple(key.strip() for key in given)
    for number, key in enumerate(keys, start=1):
        if not key:
            raise ValueError(
                f"{source}: key {number} is empty, as from a variable that is not set, and would serve everybody; to "
                f"do that on purpose, leave out --api-key and unset {KEY_VARIABLE}"
            )
        unfit = next((character for character in key if ord(character) < 32 or ord(character) == 127), None)
        if unfit is not None:
            raise ValueError(
                f"{source}: key {number} has the control character U+{ord(unfit):04X} in it, which no HTTP header can "
                "carry; several keys are several arguments: --api-key ONE TWO"
            )
    return keys


def default_hosts(host: str | None) -> tuple[str, ...]:
    """The Host headers to accept where --allowed-hosts names none, for a server bound to `host`; None: a Unix socket.

    On a loopback address only the machine's own names for it: a web page under a name that its owner points to
    127.0.0.1 (DNS rebinding) sends that name. On other addresses any: whoever reaches the server needs no browser to
    ask, and the names of proxies and services aren't known here.
    """
    return ("localhost", "127.0.0.1", "[::1]", host) if host is not None and _is_loopback(host) else (ANY_HOST,)


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return bool(found) and all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
    except (OSError, ValueError):  # no such name: binding says so
        return False


def host_name(host: str) -> str:
    """A Host header, or an address, without its port: in lower case, IPv6 in brackets."""
    host = host.strip().lower()
    if host.count(":") > 1 and not host.startswith("["):
        return f"[{host}]"
    head, bracket, _ = host.partition("]")
    return head + bracket if bracket else host.partition(":")[0].removesuffix(".")
