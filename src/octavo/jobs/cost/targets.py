"""What a word on the command line of `octavo cost` stands for: a checkpoint, one to be quantized, or a server's URL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

import msgspec

from octavo.calibration.choices import Algorithm
from octavo.calibration.recipe import RecipeError, parse_scheme
from octavo.quant.hub import model_name
from octavo.quant.scheme import AT_LOAD, GROUP_SIZES, PRESETS

LABEL = re.compile(r"([\w .+-]+)=(.+)", re.DOTALL)
SAFE = re.compile(r"[^A-Za-z0-9._-]+")
ALGORITHMS = get_args(Algorithm)
SIZES = tuple(map(str, (*GROUP_SIZES, -1)))  # as spelled


class TargetError(ValueError):
    """A word that names no model; the message is one line."""


class Target(msgspec.Struct, frozen=True, omit_defaults=True):
    """label: its name in the report. model: a directory, a Hub id or a URL. scheme: what it is quantized to first."""

    label: str
    kind: Literal["checkpoint", "quantized", "server"]
    model: str
    scheme: str = ""
    algorithm: str = ""

    @property
    def directory_name(self) -> str:
        """Where its quantized copy lies."""
        return SAFE.sub("-", f"{model_name(self.model)}-{self.scheme}-{self.algorithm}")


def parse_target(word: str) -> Target:
    """[LABEL=]MODEL, [LABEL=]MODEL@SCHEME[@GROUP][/ALGORITHM] or [LABEL=]URL. Raises TargetError."""
    label = ""
    if (match := LABEL.fullmatch(word)) and not Path(word).exists():
        label = match[1].strip()
        word = match[2]
    if word.startswith(("http://", "https://")):
        try:
            host = urlsplit(word).netloc.rpartition("@")[2]
        except ValueError as e:
            raise TargetError(f"{word}: {e}") from e
        return Target(label or host, "server", word)
    if "@" not in word or Path(word).expanduser().exists():
        return Target(label or model_name(word), "checkpoint", word)
    model, _, how = word.partition("@")
    scheme, _, algorithm = how.partition("/")
    name, at, group = scheme.partition("@")
    preset = AT_LOAD.get(name.lower(), name.upper())
    if not model or preset not in PRESETS:
        raise TargetError(
            f"{word}: {name!r} is no scheme to quantize to; {', '.join(AT_LOAD)} or one of {', '.join(PRESETS)} is"
        )
    if at and group not in SIZES:
        raise TargetError(f"{word}: {group!r} is not a group size; {', '.join(SIZES)} are, as in W4A16@64")
    try:
        parse_scheme(f"{preset}{at}{group}")
    except RecipeError as e:
        raise TargetError(f"{word}: {e}") from e
    algorithm = algorithm.lower() or "auto"
    if algorithm not in ALGORITHMS:
        raise TargetError(f"{word}: {algorithm!r} is no algorithm; {', '.join(ALGORITHMS)} are")
    shown = f"{model_name(model)} {preset}{at}{group}" + (f" {algorithm}" if algorithm != "auto" else "")
    return Target(label or shown, "quantized", model, f"{preset}{at}{group}", algorithm)


def parse_targets(words: Sequence[str]) -> list[Target]:
    """All of them, under different names. Raises TargetError."""
    targets = [parse_target(word) for word in words]
    labels = [target.label for target in targets]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise TargetError(f"two models are called {twice[0]!r}: LABEL=MODEL gives one another name")
    by_directory: dict[str, Target] = {}
    for target in targets:
        if target.kind != "quantized":
            continue
        first = by_directory.setdefault(target.directory_name, target)
        if first.model != target.model:
            raise TargetError(
                f"{first.model} and {target.model} would be quantized into one directory, {target.directory_name}: "
                "another -o is for one of them"
            )
    return targets
