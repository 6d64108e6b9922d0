"""A barrier for the threads of one training run: they wait for each other a few hundred thousand times.

Entering a parallel region of OpenMP costs about 2 us; this costs the trip of one cache line. It spins, and
gives the core away where that takes long, so that it also works with more threads than cores.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels.jit import inlined_jit
from fastdl.kernels.numba_private import cgutils

# 64-bit words between the counters that threads write, so that none shares a cache line with another
LINE = 8
# a run's counters: arrivals at the barrier; whether to stop; steps that are done; each thread's arrivals
ARRIVALS, STOP, STEPS, OWN = (position * LINE for position in range(4))
# how often a thread looks before it gives its core away, about 20 us
_SPINS = 1 << 12


@intrinsic
def _add(typing_context, counters, at, value):
    """Add to a counter, seen by the other threads with all that was written before; return the new value."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(counters)(context, builder, arguments[0]).data
        pointer = builder.gep(data, [arguments[1]])
        old = builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")
        return builder.add(old, arguments[2])

    return types.int64(counters, types.intp, types.int64), generate


@intrinsic
def _load(typing_context, counters, at):
    """Return a counter as another thread last wrote it, and see all that was written before."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(counters)(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(counters, types.intp), generate


@intrinsic
def _yield_core(typing_context):
    """Let another thread have this core."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@inlined_jit
def wait(team, thread):
    """Return whether to go on: when all threads have called this for the same time, or the run is to stop.

    STOP is never taken back, and what a stopped run has computed counts for nothing. So threads need not
    agree on the step in which they see it: one that goes on sees it where it would wait for one that left.
    """
    counters = team.counters
    counters[OWN + thread * LINE] += 1
    goal = counters[OWN + thread * LINE] * team.members.size
    arrivals: int = _add(counters, ARRIVALS, 1)
    spins = 0
    while arrivals < goal and _load(counters, STOP) == 0:
        spins += 1
        if spins > _SPINS:
            _yield_core()
        arrivals = _load(counters, ARRIVALS)
    return _load(counters, STOP) == 0
