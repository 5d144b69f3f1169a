"""A server that a command asks over HTTP, one request at a time: its address, its key, and why it can't be reached."""

from __future__ import annotations

import httpx

from octavo.bench.sse import one_line

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def server_url(url: str) -> str:
    """The address without /v1. Raises ValueError, in one line, for what is no URL of a server."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        parts = httpx.URL(base)
        parts.raw_host.decode().encode("idna")  # getaddrinfo does, and httpx lets its error through
    except (httpx.InvalidURL, UnicodeError) as e:
        raise ValueError(f"{url}: {e}") from e
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
    return base


def http_client(base: str, api_key: str | None, timeout: httpx.Timeout | float) -> httpx.Client:
    """A client of this server, which sends the key."""
    return httpx.Client(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=timeout,
        trust_env=httpx.URL(base).host not in LOOPBACK,  # no proxy leads to this machine itself
    )


def unreachable(base: str, error: httpx.HTTPError) -> str:
    """Why a request came to nothing, in one line."""
    return f"{base}: {one_line(str(error)) or type(error).__name__}"
