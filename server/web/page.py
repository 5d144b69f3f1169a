"""The page at `/` of a server: a playground, a dashboard, and the quantization report of the model's directory.

The page is files that are the same for every server, so a browser gets them without a key; whatever they show, they ask
the server's other routes for, with the key that the user types. Their policies allow no script but these files, and no
connection but to this server. Comparing with another server is the exception: `/?compare` is the same page under a
policy that lets it connect anywhere, so that a conversation at `/` never runs under it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from octavo.calibration.report.file_names import PAGE
from octavo.server.errors import ApiError

FILES = Path(__file__).parent / "static"
INDEX = "index.html"
FRAME = "report-frame.html"
BASE = "<!-- base -->"  # in INDEX, where a proxy's prefix goes
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_OWN_FILES = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; frame-src 'self'; "
_NOTHING_ELSE = "base-uri 'self'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
POLICY = f"{_OWN_FILES}connect-src 'self'; {_NOTHING_ELSE}"
COMPARE_POLICY = f"{_OWN_FILES}connect-src 'self' http: https:; {_NOTHING_ELSE}"
# A checkpoint may be a stranger's. octavo's reports have no script, and so none runs in one; by `sandbox` it has an
# origin of its own, without this one's storage, and it connects to nothing. The frame's own script shows it.
_REPORT = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; sandbox"
REPORT_POLICY = f"{_REPORT}; frame-ancestors 'none'"
FRAME_POLICY = f"{_REPORT} allow-scripts; script-src 'self'; frame-ancestors 'self'"
SAFETY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
MAGIC = b"<!DOCTYPE html>"  # with which every report begins: a link to some other file of the machine does not


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent. The tag is of its bytes: the files of a wheel all have the same date."""

    content: bytes
    headers: Mapping[str, str]

    @classmethod
    def made(cls, content: bytes, name: str) -> PageFile:
        """The file of this name."""
        headers = {
            "Content-Type": TYPES[Path(name).suffix],
            "Cache-Control": "no-cache",  # ask each time whether it has changed: another octavo may be there by then
            "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            **SAFETY,
        }
        if name == FRAME:
            headers["Content-Security-Policy"] = FRAME_POLICY
        return cls(content, headers)

    def response(self, request: Request, more: Mapping[str, str] | None = None) -> Response:
        """200 with the content, or 304 for a browser that has it."""
        headers = {**self.headers, **(more or {})}
        if self.headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers)


class _IndexRoute(Route):
    """`/` for who wants HTML; Ollama's route has the others, to whom it says that a server is there."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)  # first: most requests are for other paths
        return (match, child_scope) if match == Match.NONE or _wants_html(scope) else (Match.NONE, {})


def routes(root_path: str, directory: Path | None) -> Iterator[BaseRoute]:
    """The page itself, its files, and the report that `octavo quantize` has written into the model's directory."""
    files = {
        path.relative_to(FILES).as_posix(): PageFile.made(path.read_bytes(), path.name)
        for path in FILES.rglob("*")
        if path.suffix in TYPES
    }
    base = f'<base href="{escape(root_path.rstrip("/"))}/">' if root_path else ""
    index = PageFile.made(files.pop(INDEX).content.replace(BASE.encode(), base.encode()), INDEX)

    async def page(request: Request) -> Response:
        policy = COMPARE_POLICY if "compare" in request.query_params else POLICY
        more = {"Content-Security-Policy": policy, "Cross-Origin-Opener-Policy": "same-origin", "Vary": "Accept"}
        return index.response(request, more)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise ApiError(404, f"the page has no file {name[:80]!r}")
        return files[name].response(request)

    def report(_: Request) -> Response:
        path = report_of(directory)
        if path is None:
            raise ApiError(404, f"there is no {PAGE} beside the model: `octavo quantize` writes one")
        headers = {"Content-Security-Policy": REPORT_POLICY, "Cache-Control": "no-cache", **SAFETY}
        return FileResponse(path, headers=headers, media_type="text/html; charset=utf-8")

    yield _IndexRoute("/", page)
    yield Route("/ui/{name:path}", file)
    yield Route("/quantization_report", report)


def is_public(scope: Scope) -> bool:
    """Whether a request is for the page itself: a browser that opens it can't send a key."""
    if scope["method"] not in ("GET", "HEAD"):
        return False
    path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
    return path.startswith("/ui/") or (path in ("/", "") and _wants_html(scope))


def report_of(directory: Path | None) -> Path | None:
    """The report in a model's directory, if there is one."""
    if directory is None:
        return None
    path = directory / PAGE
    try:
        with path.open("rb") as file:
            return path if file.read(len(MAGIC)) == MAGIC else None
    except OSError:
        return None


def _wants_html(scope: Scope) -> bool:
    return "text/html" in Headers(scope=scope).get("accept", "")
