"""An adapter that `octavo.LLM` and `octavo.AsyncLLM` answer with, by vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter as PEFT saves it, and a name for it. It is loaded when it is asked for first.

    lora_name: what it is known by. lora_int_id: vLLM's number for it, from 1; octavo looks at the name. lora_path: its
    directory. base_model_name: nothing looks at it. load_inplace: the name may be another adapter's, or the directory
    have other files by now; requests under way go on with what they began with. Raises ValueError.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not self.lora_name or not self.lora_path:
            raise ValueError("LoRARequest: lora_name and lora_path, a directory, must be given")
        if self.lora_int_id < 1:
            raise ValueError(f"LoRARequest: lora_int_id is {self.lora_int_id}; it must be 1 at least")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return self.lora_path

    @property
    def directory(self) -> Path:
        """The path without `~` and links."""
        return Path(self.lora_path).expanduser().resolve()


Adapters = LoRARequest | Sequence[LoRARequest | None] | None
"""One for all prompts, or one for each."""


def checked_adapters(given: object, count: int) -> list[LoRARequest | None]:
    """The adapter of each of so many prompts. Raises ValueError where one is none, or a name means two."""
    each: list[Any] = list(given) if isinstance(given, list | tuple) else [given] * count
    if len(each) != count:
        raise ValueError(f"lora_request: {len(each)} for {count} prompts; one for all or one for each works")
    meant: dict[str, LoRARequest] = {}
    for one in each:
        if one is None:
            continue
        if not isinstance(one, LoRARequest):
            raise ValueError(f"lora_request: {type(one).__name__} is no adapter; an octavo.LoRARequest is")
        if meant.setdefault(one.lora_name, one).lora_path != one.lora_path:
            paths = f"{meant[one.lora_name].lora_path} and {one.lora_path}"
            raise ValueError(f"lora_request: {one.lora_name!r} is {paths}; each adapter needs a name of its own")
    return each
