"""A model in several GGUF files, as llama-gguf-split and the gguf package write it: NAME-00001-of-00003.gguf and so on.

The first has the metadata; each has tensors of its own. The files of one model lie beside one another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from octavo.quant.gguf.header import GGUFHeader, read_header
from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import printable, shown
from octavo.quant.safetensors_file import MAX_TENSORS

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")  # of a name without .gguf
_NUMBER = "split.no"
_COUNT = "split.count"


def read_parts(path: Path) -> dict[Path, GGUFHeader]:
    """The headers of a model's files, that of `path` first: of a file by itself just its own.

    Raises CheckpointError for a part that isn't the first, or that is missing, of another model, or has a tensor twice.
    """
    first = read_header(path)
    number, count = _place(path, first)
    if number:
        raise CheckpointError(
            f"{path.name}: it is part {number + 1} of {count}; name the first, {part(path, 1, count).name}"
        )
    headers = {path: first}
    seen = set(first.tensors)
    for i in range(2, count + 1):
        other = part(path, i, count)
        if not other.is_file():
            raise CheckpointError(f"{path.name}: it is part 1 of {count}, and {other.name} is not beside it")
        header = read_header(other)
        if _place(other, header) != (i - 1, count):
            raise CheckpointError(
                f"{other.name}: it doesn't say that it is part {i} of {count}: it is of another model"
            )
        if twice := seen & header.tensors.keys():
            raise CheckpointError(f"{other.name}: it has {printable(min(twice), 100)}, which a part before it has, too")
        seen |= header.tensors.keys()
        if len(seen) > MAX_TENSORS:
            raise CheckpointError(f"{path.name}: its parts have over {MAX_TENSORS:,} tensors, which no model has")
        headers[other] = header
    return headers


def whole(parts: Mapping[Path, GGUFHeader]) -> GGUFHeader:
    """What the parts say together. Its tensors' places are those in their own files."""
    first = next(iter(parts.values()))
    tensors = {name: tensor for header in parts.values() for name, tensor in header.tensors.items()}
    factors = {name: values for header in parts.values() for name, values in header.factors.items()}
    return GGUFHeader(first.metadata, tensors, first.nbytes, factors)


def part(path: Path, number: int, count: int) -> Path:
    """Beside a model's first file, whatever its name, the name of another, counted from 1."""
    return path.with_name(f"{name_of(path.name.removesuffix('.gguf'))}-{number:05d}-of-{count:05d}.gguf")


def name_of(stem: str) -> str:
    """A model's name by that of one of its files, without .gguf."""
    return _PART.sub("", stem)


def _place(path: Path, header: GGUFHeader) -> tuple[int, int]:
    """(0, 1) of a file by itself, (i, count) of a part."""
    number = header.metadata.get(_NUMBER, 0)
    count = header.metadata.get(_COUNT, 0) or 1
    if type(number) is not int or type(count) is not int or not 0 <= number < count < 1 << 16:
        raise CheckpointError(f"{path.name}: {_NUMBER} is {shown(number)} and {_COUNT} {shown(count)}")
    return number, count
