"""Has a few launches compiled for an H100, which run nothing, and prints which of them Triton found in its cache."""

from __future__ import annotations

import importlib
import json
from typing import Any

from compiling import be_an_h100
from triton import knobs

from octavo.kernels.launching.launch import compiled_together

ROOMS = ("fused.gpu.norm", "fp8.gpu.quantize", "fp8.gpu.few", "sampling.gpu.change")


def main() -> None:
    found: dict[str, bool] = {}
    be_an_h100()

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found[src.fn.__name__] = cache_hit

    knobs.compilation.listener = note
    with compiled_together(2):
        for room in ROOMS:
            next(iter(importlib.import_module(f"octavo.kernels.{room}").proofs().values())).launch()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
