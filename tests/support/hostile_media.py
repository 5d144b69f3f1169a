"""Images that nobody should send: URLs that lead elsewhere, and files that are broken, no images, or far too large."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Callable

from tiny_vision import picture

PRIVATE = ("127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]", "0x7f000001", "2130706433")
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
OTHERS = ("TIFF", "ICO", "PPM", "PCX", "TGA", "EPS", "PDF", "ICNS", "SGI", "DDS")


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def file_of(kind: str, seed: int, width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    picture(seed, width, height).save(file, kind)
    return file.getvalue()


def png_of(width: int, height: int, data: bytes, depth: int = 8, color: int = 2, more: bytes = b"") -> bytes:
    """A PNG that says so of itself, whatever is in it."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = _chunk(b"IHDR", header) + more + _chunk(b"IDAT", zlib.compress(data, 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def hostile_url(seed: int, listener: str, secret: str) -> tuple[str, bool]:
    """(an image's URL, whether it may be an image for all that). listener: an address that notes who comes; secret: a
    file that nobody may read.
    """
    rng = random.Random(seed)
    makers: tuple[Callable[[random.Random, str, str], tuple[str, bool]], ...] = (
        _elsewhere, _file, _bomb, _truncated, _wrong_kind, _noise, _no_data, _flipped,
    )  # fmt: skip
    return makers[seed % len(makers)](rng, listener, secret)


def _elsewhere(rng: random.Random, listener: str, secret: str) -> tuple[str, bool]:  # noqa: ARG001
    scheme = rng.choice(["http", "https", "HTTP", "ftp", "gopher", "ws", "s3", "jar:http", "dict", " http"])
    host = rng.choice([*PRIVATE, "example.com", "a@127.0.0.1", "127.0.0.1.nip.io"])
    plain = [f"http://{listener}/{rng.random()}", f"http://{listener}/redirect?to=http://{host}/", f"//{listener}/x"]
    return rng.choice([*plain, f"{scheme}://{host}/{rng.randrange(99)}.png"]), False


def _file(rng: random.Random, listener: str, secret: str) -> tuple[str, bool]:  # noqa: ARG001
    forms = [f"file://{secret}", f"FILE://{secret}", secret, f"file:{secret}", f"file://localhost{secret}"]
    forms += ["file:///etc/passwd", "file:///dev/zero", "file:///proc/self/environ", "file:///dev/stdin", "file://"]
    forms += [f"file:///tmp/../..{secret}", "file:///%2e%2e/%2e%2e/etc/passwd", "file:///etc/passwd%00.png", "../x.png"]
    return rng.choice(forms), False


def _bomb(rng: random.Random, listener: str, secret: str) -> tuple[str, bool]:  # noqa: ARG001
    side = rng.choice([8193, 20_000, 65_535, 2**31 - 1])
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20), 9)) if rng.random() < 0.2 else b""
    profile = _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 << 20), 9)) if rng.random() < 0.2 else b""
    small = bool(text or profile)
    width = 8 if small else side
    unfolded = bytes(rng.choice([100, 1 << 20, 64 << 20]))
    content = png_of(
        width, width, unfolded, depth=rng.choice([8, 16]), color=rng.choice([0, 2, 6]), more=text + profile
    )
    gif = (
        b"GIF89a"
        + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
    )
    long = png_of(1, side, bytes(2 * side) if side < 70_000 else b"", color=0)
    return rng.choice(
        [(data_url(content), small), (data_url(gif + b"\x02\x00;"), False), (data_url(long), side < 70_000)]
    )


def _truncated(rng: random.Random, listener: str, secret: str) -> tuple[str, bool]:  # noqa: ARG001
    kind = rng.choice(KINDS)
    content = file_of(kind, rng.randrange(100))
    end = rng.randrange(len(content) * 9 // 10)
    return data_url(content[:end]), kind == "GIF"  # whose end may hold nothing


def _wrong_kind(rng: random.Random, listener: str, secret: str) -> tuple[str, bool]:  # noqa: ARG001
    texts = [b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1/'/></svg>", b"<html></html>"]
    texts += [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run", b"PK\x03\x04", b"%PDF-1.7", b""]
    texts += [b"\x00\x00\x00\x18ftypmp42", b"push graphic-context\nimage over 0,0 0,0 'http://127.0.0.1/x'", b"GIF89a"]
    content = rng.choice([*texts, *(_saved(kind) for kind in rng.sample(OTHERS, 2))])
    return data_url(content, rng.choice(["image/png", "image/svg+xml", "text/html", "application/pdf", ""])), False


def _saved(kind: str) -> bytes:
    file = io.BytesIO()
    picture(1, 32, 32).save(file, kind)
    return file.getvalue()


def _noise(rng: random.Random, listener: str, secret: str) -> tuple[str, bool]:  # noqa: ARG001
    begin = rng.choice(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"GIF89a", b"BM"]
    )
    return data_url(begin + rng.randbytes(rng.randrange(3000))), begin == b"GIF89a"


def _no_data(rng: random.Random, listener: str, secret: str) -> tuple[str, bool]:  # noqa: ARG001
    good = base64.b64encode(file_of("PNG", 1)).decode()
    forms = [
        f"data:image/png,{good}",
        f"data:image/png;base64,{good[:-1]}",
        "data:,",
        "data:",
        "",
        "data:image/png;base64",
    ]
    forms += [
        f"data:image/png;base64,{good}\n!",
        f"data:image/png;base64,{good[:50]} {good[50:]}é",
        "\0",
        "x" * 100_000,
    ]
    forms += [f"data:text/html;base64,{good}", f"data:image/png;base64;charset=x,{good}", "javascript:alert(1)", good]
    return rng.choice(forms), False


def _flipped(rng: random.Random, listener: str, secret: str) -> tuple[str, bool]:  # noqa: ARG001
    content = bytearray(file_of(rng.choice(KINDS), rng.randrange(100)))
    for _ in range(rng.choice([1, 5, 50])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return data_url(bytes(content)), True
