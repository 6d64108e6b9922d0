"""How kernels split their work among threads."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels.cpu.threads import function_type, run, share
from fastdl.kernels.jit import inlined_jit, linked_jit
from fastdl.kernels.numba_private import cgutils, signature

__all__ = ["share", "shared_out", "worthwhile_threads"]

# below this many elements a thread's share takes less time than handing it over (about 2 us)
MIN_ELEMENTS_PER_THREAD = 1 << 13


@inlined_jit
def worthwhile_threads(num_elements, num_threads):
    """Return how many of the threads have enough of the elements to pay for handing it over."""
    return max(1, min(num_threads, num_elements // MIN_ELEMENTS_PER_THREAD))


def shared_out(part):
    """Make ``share_out(arguments, length, num_threads)`` of a thread's ``part(*arguments, start, stop)``.

    What is computed may not depend on how ``range(length)`` is split.
    """
    part = linked_jit(part)

    @intrinsic
    def share_out(typing_context, arguments, length, num_threads):
        kind = types.BaseTuple.from_types([types.unliteral(argument) for argument in arguments])

        def generate(context, builder, sig, values):
            function = _function(context, builder.module, part, kind)
            memory = cgutils.alloca_once_value(builder, values[0])
            addresses = [builder.ptrtoint(pointer, values[1].type) for pointer in (function, memory)]
            context.get_function(run, signature(types.none, *(types.intp,) * 4))(
                builder, [*addresses, *values[1:]]
            )
            return context.get_dummy_value()

        return types.void(kind, types.intp, types.intp), generate

    return share_out


def _function(context: Any, module: Any, part: Any, kind: Any) -> Any:
    """Return the function of ``threads`` that calls part with the arguments, a tuple, at an address."""
    name = f"{part.__module__}.{part.__name__}.{kind}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, function_type(context), name)
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    address, start, stop = function.args[2:]
    memory = builder.inttoptr(address, context.get_value_type(kind).as_pointer())
    arguments = cgutils.unpack_tuple(builder, builder.load(memory))
    part_signature = signature(types.none, *kind, types.intp, types.intp)
    context.get_function(part, part_signature)(builder, [*arguments, start, stop])
    context.call_conv.return_value(builder, context.get_dummy_value())
    return function
