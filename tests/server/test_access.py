"""Who may ask: keys, and the names under which a server is addressed, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from octavo_server import PATIENCE, Server, forked, serving

from octavo.server.access import Access, api_keys, default_hosts, host_name

OPEN_WITHOUT_A_KEY = ["/health", "/ping"]
CLOSED_BY_PROTECT_ALL = ["/metrics", "/version", "/docs", "/openapi.json"]


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server with a key, whose environment's key has the newline of the file that it came out of."""
    flags = ("--protect-all", "--allowed-hosts", "models.example", "*.inside.example", "127.0.0.1")
    with serving(*flags, environment={"OCTAVO_API_KEY": "secret\n"}) as server:
        yield server


def test_protect_all_leaves_the_probes_open_alone(locked: Server) -> None:
    with locked.client() as client:
        for path in OPEN_WITHOUT_A_KEY:
            assert client.get(path).status_code == 200
        for path in [*CLOSED_BY_PROTECT_ALL, "/v1/models"]:
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_without_protect_all_monitoring_needs_no_key() -> None:
    with serving("--api-key", "one", "two ") as server, server.client() as client:
        for path in OPEN_WITHOUT_A_KEY + CLOSED_BY_PROTECT_ALL:
            assert client.get(path).status_code == 200
        for key, status in (("tw", 401), ("two", 200), ("one", 200), ("three", 401), ("On", 401)):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        (["--api-key", ""], {}, "--api-key: key 1 is empty"),
        (["--api-key", "good", " \n"], {}, "--api-key: key 2 is empty"),
        ([], {"OCTAVO_API_KEY": ""}, "OCTAVO_API_KEY: key 1 is empty"),
        (["--api-key", "a\nb"], {}, "U+000A"),
        (["--protect-all"], {}, "--protect-all"),
    ],
)
def test_keys_that_could_not_be_meant_are_refused_at_start(
    flags: list[str], environment: dict[str, str], named: str
) -> None:
    with forked(*flags, environment=environment) as server:
        assert server.exit_code() == 1
    (line,) = server.lines
    assert named in line
    assert "Traceback" not in server.said


def test_keys_of_the_command_line_replace_those_of_the_environment() -> None:
    assert api_keys(["a"], {"OCTAVO_API_KEY": "b"}) == ("a",)
    assert api_keys(None, {"OCTAVO_API_KEY": "b"}) == ("b",)
    assert api_keys(None, {}) == ()


def asked_as(server: Server, host: str | None, path: str = "/v1/models") -> int:
    """The status of an answer to a request with this Host header."""
    address, port = server.url.removeprefix("http://").split(":")
    header = "" if host is None else f"Host: {host}\r\n"
    version = "1.0" if host is None else "1.1"
    with socket.create_connection((address, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(f"GET {path} HTTP/{version}\r\n{header}Connection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").readline()
    return int(answer.split()[1])


def test_on_a_loopback_address_only_its_own_names_are_answered(server: Server, client: httpx.Client) -> None:
    port = server.url.rpartition(":")[2]
    for host in ("localhost", "LOCALHOST:8000", f"127.0.0.1:{port}", "[::1]:80", "localhost.", None):
        assert asked_as(server, host) == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]"):
        for path in ("/v1/models", "/metrics", "/health"):
            assert asked_as(server, host, path) == 421, host
    error = client.get("/v1/models", headers={"Host": "evil.example"}).json()["error"]
    assert "'evil.example'" in error["message"]
    assert "--allowed-hosts" in error["message"]


def test_allowed_hosts_replace_the_default(locked: Server) -> None:
    for host in ("models.example:443", "a.inside.example", "b.a.inside.example", "127.0.0.1"):
        assert asked_as(locked, host, "/health") == 200, host
    for host in ("localhost", "inside.example", "xmodels.example", "a.inside.example.evil.example"):
        assert asked_as(locked, host, "/health") == 421, host


def test_elsewhere_any_host_is_answered() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", None):
        assert default_hosts(host) == Access().hosts == ("*",)
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert host in default_hosts(host)


def test_names_of_hosts() -> None:
    names = {"A.Example:80": "a.example", "::1": "[::1]", "[::1]:80": "[::1]", "a.example.": "a.example", "": ""}
    assert {given: host_name(given) for given in names} == names
