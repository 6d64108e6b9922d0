"""The parallel region of the OpenMP that the process has, by its entry point in GNU's libgomp.

torch brings libgomp, and its threads spin for a while after each region. Who computes between torch's ops on
other threads competes with them for the cores.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels.numba_private import signature

_STATUS = Path("/proc/self/stat")
# a bit of Linux's flags of a process (PF_FORKNOEXEC): it is a fork that runs its parent's program
_IS_FORKED = 0x40


def region_address() -> int:
    """Return the address of ``GOMP_parallel``; 0 where there is none, or this process must not call it.

    In a forked process whose parent had threads of OpenMP, a region never ends: libgomp waits for them.
    """
    try:
        flags = int(_STATUS.read_text().rpartition(")")[2].split()[6])
        address = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, ValueError, IndexError, AttributeError, TypeError):
        return 0
    # an emulation of Linux may know no flags
    return 0 if flags == 0 or flags & _IS_FORKED else address or 0


def parallel_region(function):
    """Make ``region(address)``, which calls function, of no arguments, once on each thread of a region.

    `address` is :func:`region_address`'s. The region has as many threads as torch's ops; it returns when all
    of them have left.
    """

    @intrinsic
    def region(typing_context, address):
        def generate(context, builder, sig, values):
            pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            body = ir.FunctionType(ir.VoidType(), [pointer])
            # void GOMP_parallel(void (*function)(void *), void *data, unsigned num_threads, unsigned flags)
            entry = ir.FunctionType(ir.VoidType(), [body.as_pointer(), pointer, number, number])
            arguments = _body(context, builder.module, function, body), pointer(None), number(0), number(0)
            builder.call(builder.inttoptr(values[0], entry.as_pointer()), arguments)
            return context.get_dummy_value()

        return types.void(types.intp), generate

    return region


def _body(context, module, function, kind):
    """Return the C function that calls function, which can't fail."""
    name = f"{function.__module__}.{function.__name__}"
    if f"{name}.body" in module.globals:
        return module.globals[f"{name}.body"]
    call = ir.Function(module, context.call_conv.get_function_type(types.none, ()), f"{name}.call")
    body = ir.Function(module, kind, f"{name}.body")
    call.linkage = body.linkage = "internal"
    builder = ir.IRBuilder(call.append_basic_block())
    context.get_function(function, signature(types.none))(builder, [])
    context.call_conv.return_value(builder, context.get_dummy_value())
    builder = ir.IRBuilder(body.append_basic_block())
    context.call_conv.call_function(builder, call, types.none, (), [])
    builder.ret_void()
    return body
