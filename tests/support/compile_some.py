"""Has a few launches compiled for an H100, which run nothing, and prints which of them Triton found in its cache."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from octavo.kernels.launch import compiled_together

ROOMS = ("fused.gpu.norm", "fp8.gpu.quantize", "fp8.gpu.few", "sampling.gpu.change")


def main() -> None:
    found: dict[str, bool] = {}
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    )

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found[src.fn.__name__] = cache_hit

    knobs.compilation.listener = note
    with compiled_together(2):
        for room in ROOMS:
            next(iter(importlib.import_module(f"octavo.kernels.{room}").proofs().values())).launch()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
