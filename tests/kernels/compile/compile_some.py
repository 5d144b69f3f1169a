"""Compile a few launches for an H100 without running them, and print which of them Triton found in its cache."""

from __future__ import annotations

import json
from typing import Any

from ahead import makers
from compiling import be_an_h100
from triton import knobs

from octavo.kernels.launching.launch import compiled_together

MAKERS = ("norm norm", "fp8 quantize", "gemm swap_ab", "sampling change")


def main() -> None:
    found: dict[str, bool] = {}
    be_an_h100()

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found[src.fn.__name__] = cache_hit

    knobs.compilation.listener = note
    with compiled_together(2):
        for name in MAKERS:
            next(iter(makers()[name]().values())).launch()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
