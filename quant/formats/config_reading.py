"""What the parsers of every `quantization_config` share: types of keys checked by name, and keys with two spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from octavo.quant.formats.format import FormatError

T = TypeVar("T")


def check_types(raw: Mapping[str, Any], kind: type[T], where: str = "quantization_config") -> T:
    """`raw` as a msgspec Struct; keys that it doesn't have are left out. Raises FormatError that names the key."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as e:
        raise FormatError(f"{where}: {str(e).replace('`$.', '`')}") from None


def first_given(*values: T | None) -> T | None:
    """The first value that is not None: of a key's spellings, the one that the writer used."""
    return next((value for value in values if value is not None), None)
