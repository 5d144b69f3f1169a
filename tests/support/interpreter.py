"""Triton's interpreter, without work of its that changes nothing: two thirds of the time that its tests took.

It works out for each sum and product of integers whether it overflows, and drops the answer, as it isn't debugging.
At each call of a jitted function within a kernel it patches `triton.language`, which the kernel's launch has done.
And for each number that it computes it builds the type and shape anew, although a kernel has but a few of them.
Kernels compute without all that what they compute with it (Triton 3.9).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def spare() -> None:
    """Leave it out from now on, in this process."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_a_type(interpreter._get_np_dtype)
    tl.block_type.__init__ = _once_a_shape(tl.block_type.__init__)
    tl.tensor.__init__ = _with_the_shape_of_its_type(tl.tensor.__init__)
    tl.dtype.__eq__ = _at_once(tl.dtype.__eq__)
    TritonSemantic.broadcast_impl_value = _unless_shapes_agree(TritonSemantic.broadcast_impl_value)
    TritonSemantic.computation_type_impl = _once_a_pair(TritonSemantic.computation_type_impl)
    TritonSemantic.cast = _unless_types_agree(TritonSemantic.cast)


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


def _once_a_type(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_get_np_dtype`: of a block it is that of its elements, and a type's name is its own."""
    known: dict[str, Any] = {}

    def look_up(of: Any) -> Any:
        element = of.element_ty if isinstance(of, tl.block_type) else of
        if element.name not in known:
            known[element.name] = np_dtype(element)
        return known[element.name]

    return look_up


def _once_a_shape(init: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`: the same attributes for the same elements and shape."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def look_up(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(size.value if type(size) is tl.constexpr else size for size in shape))
        if key not in known:
            init(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])
        self.element_ty = element_ty

    return look_up


def _with_the_shape_of_its_type(init: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__`: all but the value follows from the type."""
    known: dict[str, dict[str, Any]] = {}

    def look_up(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            init(self, handle, type)
            known[type.name] = dict(vars(self), handle=None)
        vars(self).update(known[type.name])
        self.handle = handle
        self.type = type
        self.dtype = type.scalar

    return look_up


def _at_once(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """`dtype.__eq__`: a type is itself, of which there is one each."""
    return lambda self, other: self is other or equal(self, other)


def _once_a_pair(common: Callable[..., Any]) -> Callable[..., Any]:
    """`computation_type_impl`: in which type two numbers are added depends on their types alone."""
    known: dict[tuple[Any, ...], Any] = {}

    def look_up(self: Any, a_ty: Any, a_is_scalar: bool, b_ty: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
        if key not in known:
            known[key] = common(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return known[key]

    return look_up


def _unless_types_agree(cast: Callable[..., Any]) -> Callable[..., Any]:
    """`cast`, which leaves numbers of the wanted type as they are."""

    def look_first(self: Any, input: Any, dst_ty: Any, *rounding: Any, **named: Any) -> Any:
        if input.type.scalar is dst_ty.scalar:
            return input
        return cast(self, input, dst_ty, *rounding, **named)

    return look_first


def _unless_shapes_agree(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """`broadcast_impl_value`, which leaves two blocks of one shape as they are."""

    def look_first(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return look_first
