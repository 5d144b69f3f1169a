"""As much of the Hub as its client needs to list and download one repository, on a socket of this machine."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def fake_hub(repository: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """The address for HF_ENDPOINT. repository: '/datasets/owner/name', or '/owner/name' of a model; files: by path."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            is_api = url.path.startswith("/api")
            path = url.path.removeprefix("/api/models").removeprefix("/api")
            name = path.removeprefix(repository)
            what, _, rest = name.removeprefix("/").partition("/")
            inner = rest.partition("/")[2]
            if name == path or (name and not name.startswith("/")):
                self.send_error(404)
            elif is_api and what in ("", "revision"):
                siblings = [{"rfilename": name} for name in files]
                self._answer(json.dumps({"id": repository[1:], "sha": COMMIT, "siblings": siblings}).encode())
            elif is_api and what == "tree":
                is_deep = parse_qs(url.query).get("recursive") in (["True"], ["true"])
                self._answer(json.dumps(_tree(files, inner, is_deep)).encode())
            elif what == "resolve" and inner in files:
                self._answer(files[inner])
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{_hash(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _tree(files: Mapping[str, bytes], folder: str, is_deep: bool) -> list[dict[str, object]]:
    """The entries below a folder, those right below it or all."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        first, _, deeper = name.removeprefix(prefix).partition("/")
        if deeper:
            below = prefix + first
            entries[below] = {"type": "directory", "oid": _hash(below.encode()), "size": 0, "path": below}
        if is_deep or not deeper:
            entries[name] = {"type": "file", "oid": _hash(content), "size": len(content), "path": name}
    return list(entries.values())


def _hash(content: bytes) -> str:
    return sha1(content).hexdigest()
