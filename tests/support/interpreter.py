"""Triton's interpreter, without work of its that changes nothing: half of the time that its tests took.

It works out for each sum and product of integers whether it overflows, and drops the answer, as it isn't debugging.
And at each call of a jitted function within a kernel it patches `triton.language`, which the kernel's launch has done.
Kernels compute without either what they compute with it (Triton 3.6 and 3.9).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def spare() -> None:
    """Leave it out from now on, in this process."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_patch_lang`, which a launch undoes at its end, and a call within it never."""
    patched: set[frozenset[str]] = set()

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc, name-defined]
        """What undoes a patch."""

        def restore(self) -> None:
            patched.clear()
            super().restore()

    @functools.cache
    def languages(function: Any) -> frozenset[str]:
        """What is patched for a function: as its module names them, `triton.language`, its `core`, or both."""
        modules = filter(inspect.ismodule, function.__globals__.values())
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    @functools.wraps(patch)
    def patch_once(function: Any) -> Any:
        if languages(function) in patched:
            return Scope()
        scope = patch(function)
        patched.add(languages(function))
        return scope

    interpreter._LangPatchScope = Scope
    return patch_once
