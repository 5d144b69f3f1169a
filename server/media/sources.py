"""Where an image's bytes come from: the request itself, or a file below a directory that the server allows.

Nothing is fetched: a server that opens what a client names is a way into the network that it stands in.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from octavo.server.errors import ApiError, bad_request

MAX_FILE_BYTES = 32 << 20
_DATA = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)


class ImageSource(NamedTuple):
    """An image as a request names it. field: of the request, and the image's number in it from 1, for errors."""

    url: str
    field: str
    number: int

    def refusal(self, why: str) -> ApiError:
        return bad_request(f"{self.field}: image {self.number}: {why}", self.field)


def content_of(source: ImageSource, directory: Path | None) -> bytes:
    """The file of an image. Raises ApiError. directory: below which files may be named; None: none may."""
    scheme = source.url[:8].partition(":")[0].lower()
    match scheme:
        case "data":
            return _of_data(source)
        case "file":
            return _of_file(source, directory)
        case "http" | "https":
            raise source.refusal("nothing is fetched from the network here: send the image itself, as a data: URL")
    raise source.refusal(f"{source.url[:40]!r} is no URL of an image; data:image/png;base64,... is one")


def _of_data(source: ImageSource) -> bytes:
    found = _DATA.match(source.url[:256])
    if found is None or found[2].lower().rpartition(";")[2] != "base64":
        raise source.refusal("a data: URL must have its bytes in base64, such as data:image/png;base64,...")
    kind = found[1].lower()
    if kind and not kind.startswith("image/"):
        raise source.refusal(f"the data: URL says that it is {kind[:40]!r}, and no image")
    try:
        return base64.b64decode(source.url[found.end() :], validate=True)
    except (binascii.Error, ValueError):  # the latter for what isn't ASCII
        raise source.refusal("the data: URL's bytes are not base64") from None


def _of_file(source: ImageSource, directory: Path | None) -> bytes:
    if directory is None:
        raise source.refusal("this server reads no files (it would those below --allowed-local-media-path)")
    try:
        _, host, path, *_ = urlsplit(source.url)
    except ValueError:  # brackets around what is no address
        host = path = "["
    if host not in ("", "localhost") or "\0" in unquote(path):
        raise source.refusal("a file of this machine is wanted: file:///PATH")
    root = os.path.realpath(directory)
    path = os.path.realpath(unquote(path))
    if os.path.commonpath((root, path)) != root or path == root:
        raise source.refusal("the file doesn't lie below --allowed-local-media-path")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise source.refusal(f"the file can't be read: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise source.refusal("it is no plain file")
        if about.st_size > MAX_FILE_BYTES:
            raise source.refusal(f"the file has {about.st_size} bytes; {MAX_FILE_BYTES} are the most")
        return file.read(MAX_FILE_BYTES)
