"""A GGUF file's metadata by key: a value of another type, or out of its range, is refused with the key and the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import shown


@dataclass(frozen=True)
class Keys:
    """The values whose keys begin with a prefix, such as 'llama.'; every method raises CheckpointError."""

    metadata: Mapping[str, Any]
    prefix: str = ""

    def get(self, key: str) -> Any:
        return self.metadata.get(self.prefix + key)

    def names(self) -> list[str]:
        """All keys, without the prefix."""
        return [key.removeprefix(self.prefix) for key in self.metadata if key.startswith(self.prefix)]

    def count(self, key: str, otherwise: int | None = None) -> int:
        """1 to 2^24; otherwise: where there is no such key, which is else needed."""
        value = self.get(key)
        if value is None:
            value = otherwise
        if type(value) is not int or not 1 <= value <= 1 << 24:
            self.refuse(key, "a number, the same for all layers, is needed", value)
        return value

    def positive(self, key: str, otherwise: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = otherwise
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            self.refuse(key, "a finite number above 0 is needed", value)
        return float(value)

    def flag(self, key: str, otherwise: bool) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | None):
            self.refuse(key, "true or false is needed", value)
        return otherwise if value is None else value

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if not isinstance(value, str | None):
            self.refuse(key, "a string is needed", value)
        return value

    def texts(self, key: str) -> list[str]:
        """[] where there is no such key."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(it, str) for it in value):
            self.refuse(key, "an array of strings is needed", value)
        return value

    def numbers(self, key: str, count: int, kind: type[int] | type[float]) -> list[Any] | None:
        """One integer, or one number, for each of `count` tokens; None where there is no such key."""
        value = self.get(key)
        if value is None:
            return None
        kinds = (int,) if kind is int else (int, float)
        numbers: list[Any] = value if isinstance(value, list) else []
        if len(numbers) != count or not all(type(it) in kinds and not math.isnan(it) for it in numbers):
            raise CheckpointError(f"{self.prefix}{key} is not one number for each token")
        return numbers

    def token(self, key: str, num_tokens: int) -> int | None:
        """A token's id."""
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < num_tokens):
            raise CheckpointError(f"{self.prefix}{key} is {shown(value)}, and there are {num_tokens} tokens")
        return value

    def refuse(self, key: str, rule: str, value: Any) -> NoReturn:
        raise CheckpointError(f"{self.prefix}{key} is {shown(value)}; {rule}")
