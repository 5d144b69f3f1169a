"""The options of LoRA adapters that the engine needs. Flags have vLLM's names; SGLang's are hidden aliases."""

# No `from __future__ import annotations`: each option would be compiled again at each start, to make its flag.

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]


class LoraOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many adapters there may be, how large, and of what."""

    enable_lora: Annotated[
        bool, Meta(description="serve LoRA adapters beside the model, on a CPU", extra={"group": "LoRA adapters"})
    ] = False
    max_loras: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="adapters that the requests of one step may use",
            extra={"aliases": ("--max-loras-per-batch",), "metavar": "N"},
        ),
    ] = 4
    max_lora_rank: Annotated[
        int, Meta(ge=1, le=4096, description="the largest rank of an adapter", extra={"metavar": "N"})
    ] = 64
    max_cpu_loras: Annotated[
        Count | None,
        Meta(
            description="adapters that are kept in memory; others are read again when a request needs them",
            extra={"aliases": ("--max-loaded-loras",), "metavar": "N", "default": "--max-loras"},
        ),
    ] = None
    lora_dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Meta(description="what adapters are kept in; auto: what the model computes in"),
    ] = "auto"
    lora_target_modules: Annotated[
        tuple[str, ...],
        Meta(
            description="the only modules that adapters may change, such as q_proj: others then need no memory",
            extra={"metavar": "NAME", "default": "all that adapters may change"},
        ),
    ] = ()

    @property
    def most_loaded(self) -> int:
        """How many adapters are kept in memory; 0: none are served."""
        return (self.max_cpu_loras or self.max_loras) if self.enable_lora else 0

    def check(self, *, is_apart: bool) -> None:
        """Raise ValueError for options that contradict each other. is_apart: an engine may be on several machines."""
        if not self.enable_lora:
            return
        if is_apart:
            raise ValueError(
                "--enable-lora with --nnodes, or several ranks on Ray: all ranks of an engine read adapters on one "
                "machine; -tp and -pp on it work"
            )
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(
                f"--max-cpu-loras {self.max_cpu_loras}: a step may use --max-loras {self.max_loras} of them; "
                f"--max-cpu-loras {self.max_loras} works"
            )
