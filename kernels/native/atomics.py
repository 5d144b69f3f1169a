"""64-bit words that threads and processes share, read and written in order, and ways to wait for them."""
# ruff: noqa: ARG001 (numba looks at the names of what it compiles)

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)


def _slot(builder: Any, base: Any, index: Any) -> Any:
    return builder.gep(builder.bitcast(base, _I64.as_pointer()), [index])


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typingctx: Any, address: Any) -> Any:
    """An int64 address as a voidptr, for `numba.carray` and the words below."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def read_word(typingctx: Any, base: Any, index: Any) -> Any:
    """Word `index` behind an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_slot(builder, *args), "seq_cst", 8)

    return types.int64(types.voidptr, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def add_word(typingctx: Any, base: Any, index: Any, amount: Any) -> Any:
    """Add to a word; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _slot(builder, *args[:2]), args[2], "seq_cst")

    return types.int64(types.voidptr, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def write_word(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a word: whoever reads it sees all that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("xchg", _slot(builder, *args[:2]), args[2], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.voidptr, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def pause(typingctx: Any) -> Any:
    """Some tens of nanoseconds, in which the core's other thread may run."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def give_way(typingctx: Any) -> Any:
    """Let another thread that could run on this core do so."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def sleep(typingctx: Any, microseconds: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        usleep = cgutils.get_or_insert_function(builder.module, kind, "usleep")
        builder.call(usleep, [builder.trunc(args[0], ir.IntType(32))])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
