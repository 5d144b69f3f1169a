"""What a mixed recipe is to hold, as a value. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from octavo.calibration.recipe import RecipeError


@dataclass(frozen=True)
class Target:
    """kind: 'bits' per weight, the weight files' 'size' in bytes, 'speed' over the original's, or 'kl' in nats."""

    kind: str
    value: float

    @property
    def flag(self) -> str:
        return "--bits-budget" if self.kind == "bits" else f"--target-{self.kind}"

    def __str__(self) -> str:
        match self.kind:
            case "size":
                return f"{self.flag} {in_gb(self.value)}"
            case "speed":
                return f"{self.flag} {self.value:g}x"
        return f"{self.flag} {self.value:g}"


@dataclass(frozen=True)
class Streams:
    """What a KV cache is to hold: so many sequences of so many tokens."""

    length: int
    count: int

    def __str__(self) -> str:
        return f"{self.count} {'sequence' if self.count == 1 else 'sequences'} of {self.length:,} tokens"


def streams_of(target: Target | None, length: int | None, count: int | None) -> Streams | None:
    """The streams whose KV cache a target counts. Raises RecipeError for some that it doesn't."""
    if length is None and count is not None:
        raise RecipeError(f"--max-num-seqs {count}: how long these are is missing; --max-model-len says it")
    if length is None:
        return None
    if target is None or target.kind not in ("size", "bits"):
        raise RecipeError(
            f"--max-model-len {length}: a KV cache of that length counts with --target-size and --bits-budget alone"
        )
    return Streams(length, 1 if count is None else count)


def one_target(**asked: float | None) -> Target | None:
    """The target that is asked for, by kind. Raises RecipeError for two, and for a value that none has."""
    found = [Target(kind, value) for kind, value in asked.items() if value is not None]
    if len(found) > 1:
        raise RecipeError(f"{' and '.join(map(str, found))} are several targets, and one decides: leave the others out")
    for target in found:
        least = 1 if target.kind == "speed" else 0
        if not least < target.value < math.inf:
            raise RecipeError(f"{target.flag} {target.value}: a number above {least} is needed")
    return found[0] if found else None


def parse_speed(text: str) -> float:
    """'1.8x' or '1.8': times as fast as the original. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[xX]?", text.strip())
    if match is None or not float(match[1]) > 1:
        raise ValueError(
            f"{text!r} is no speed: one above 1x, such as 1.8x, is meant, times that of the original by the roofline"
        )
    return float(match[1])


def in_gb(size: float) -> str:
    """To the fourth digit, rounded up: what is named as reachable is."""
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e6 else ("KB", 1e3)
    digits = max(0, 3 - math.floor(math.log10(max(size / scale, 1))))
    factor = 10**digits
    return f"{math.ceil(size / scale * factor) / factor:g}{unit}"
