"""What threads tell each other through counters in memory, and how they wait: by turns awake and asleep.

A thread that waits for another spins, as that is told within 0.1 us; where it takes long it sleeps in the
kernel until woken, and its core is free for others (U. Drepper, "Futexes Are Tricky", 2011). Counters are
arrays of int64; each operation is sequentially consistent.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels.numba_private import cgutils

_INT, _LONG = ir.IntType(32), ir.IntType(64)
# the number of Linux's system call, and its operations within one process
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine())
_WAIT, _WAKE = 128, 129
# how long a thread sleeps before it looks again where there is no futex, in microseconds
_NAP = 500
_MONOTONIC_CLOCK = 1 if sys.platform == "linux" else 6


def _pointer(context: Any, builder: Any, kind: Any, counters: Any, at: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, counters).data, [at])


def _call(builder: Any, result: Any, name: str, *arguments: Any, is_variadic: bool = False) -> Any:
    """Call a function of the platform's libc."""
    fixed = [argument.type for argument in arguments[: 1 if is_variadic else None]]
    kind = ir.FunctionType(result, fixed, var_arg=is_variadic)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def load(typing_context, counters, at):
    """Return a counter."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(context, builder, counters, *arguments), "seq_cst", 8)

    return types.int64(counters, types.intp), generate


@intrinsic
def add(typing_context, counters, at, value):
    """Add to a counter, and return what it is then."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, counters, *arguments[:2])
        return builder.add(builder.atomic_rmw("add", pointer, arguments[2], "seq_cst"), arguments[2])

    return types.int64(counters, types.intp, types.int64), generate


@intrinsic
def compare_exchange(typing_context, counters, at, expected, value):
    """Set a counter that is as expected, and return whether it was."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, counters, *arguments[:2])
        found = builder.cmpxchg(pointer, arguments[2], arguments[3], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(counters, types.intp, types.int64, types.int64), generate


@intrinsic
def sleep_while(typing_context, counters, at, value, nanoseconds):
    """Sleep until woken, if the lower half of a counter is that of the value; it may end at any time.

    It ends after so many nanoseconds, at most a second; with 0 it may last for ever.
    """

    def generate(context, builder, signature, arguments):
        if _FUTEX is None or sys.platform != "linux":
            _call(builder, _INT, "usleep", _INT(_NAP))
        else:
            # the counter's lower half comes first: the processors above are little-endian
            word = _pointer(context, builder, counters, *arguments[:2])
            limit = cgutils.alloca_once(builder, ir.ArrayType(_LONG, 2))
            builder.store(ir.ArrayType(_LONG, 2)([0, 0]), limit)
            builder.store(arguments[3], builder.gep(limit, [_INT(0), _INT(1)]))
            is_limited = builder.icmp_signed("!=", arguments[3], _LONG(0))
            limit = builder.select(is_limited, limit, limit.type(None))
            value = builder.trunc(arguments[2], _INT)
            arguments = _LONG(_FUTEX), word, _INT(_WAIT), value, limit
            _call(builder, _LONG, "syscall", *arguments, is_variadic=True)
        return context.get_dummy_value()

    return types.void(counters, types.intp, types.int64, types.int64), generate


@intrinsic
def wake(typing_context, counters, at, count):
    """Wake at most so many of those that sleep at a counter."""

    def generate(context, builder, signature, arguments):
        if _FUTEX is not None and sys.platform == "linux":
            word = _pointer(context, builder, counters, *arguments[:2])
            arguments = _LONG(_FUTEX), word, _INT(_WAKE), builder.trunc(arguments[2], _INT)
            _call(builder, _LONG, "syscall", *arguments, is_variadic=True)
        return context.get_dummy_value()

    return types.void(counters, types.intp, types.int64), generate


@intrinsic
def pause(typing_context):
    """Tell the processor that this thread spins, and return the clock's nanoseconds."""

    def generate(context, builder, signature, arguments):
        if platform.machine() == "x86_64":
            _call(builder, ir.VoidType(), "llvm.x86.sse2.pause")
        elif platform.machine() == "aarch64":
            _call(builder, ir.VoidType(), "llvm.aarch64.hint", _INT(1))
        time = cgutils.alloca_once(builder, ir.ArrayType(_LONG, 2))
        _call(builder, _INT, "clock_gettime", _INT(_MONOTONIC_CLOCK), time)
        seconds, nanoseconds = (builder.extract_value(builder.load(time), part) for part in range(2))
        return builder.add(builder.mul(seconds, _LONG(10**9)), nanoseconds)

    return types.int64(), generate
