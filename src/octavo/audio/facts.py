"""Constants of sound as Whisper reads it, and the values that pass between here and the server. Imports no numpy."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

RATE = 16_000  # samples a second
HOP = 160  # samples of a moment
WIDTH = 400  # samples of a Fourier transform
LIBRARIES = ("soundfile", "soxr")


class AudioError(ValueError):
    """A file that gives no samples; the message says why. is_too_long: it would give more than the limit."""

    def __init__(self, reason: str, *, is_too_long: bool = False) -> None:
        super().__init__(reason)
        self.is_too_long = is_too_long


@dataclass(frozen=True, slots=True)
class Piece:
    """begin, seconds: where it stands in the recording. features: [rows, length] float32, little-endian."""

    begin: float
    seconds: float
    features: bytes


def missing_libraries() -> list[str]:
    """Those of the extra `audio` that aren't installed."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
