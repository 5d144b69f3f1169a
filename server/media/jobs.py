"""What the server and the process that decodes images say to each other."""

from __future__ import annotations

import msgspec

from octavo.runtime.vision.recipes import Recipe, Size


class Job(msgspec.Struct, frozen=True, array_like=True):
    """An image's file, and what its pixels are made for."""

    content: bytes
    recipe: Recipe


class Decoded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Pixels as `PromptImage` has them, and the size of the image that they were made of."""

    size: Size
    frames: tuple[Size, ...]
    pixels: bytes


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Why an image isn't read."""

    message: str


Answer = Decoded | Refused
TOO_LARGE = "it takes too much memory to decode"
