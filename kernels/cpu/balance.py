"""How the threads of a training run share its work: by how fast each of them is.

Two cores are seldom equally fast: one is of another kind, or has a neighbour that computes too. Threads that
wait for each other twice a step take as long as the slowest; so each measures how long its part of a step
took, and the next step's parts follow. Sums are never split, so the parts change no result.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels.jit import inlined_jit

# how much one step's time counts, beside those before
_WEIGHT = 0.125
# One step may have been interrupted: what it says is held to this many times what is known.
_MOST_CHANGE = 1.5
# No thread gets less than this part of an equal share, so that it can still be seen to become faster.
_LEAST_SHARE = 0.25


@intrinsic
def read_clock(typing_context):
    """Return a count that grows evenly with time, the same on all cores."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), [])
        return builder.call(builder.module.declare_intrinsic("llvm.readcyclecounter", (), kind), [])

    return types.int64(), generate


@inlined_jit
def find_bounds(members, bounds):
    """Write where each thread's part of any work begins and ends, to (num_threads + 1,) shares of the whole.

    The threads' speeds, of ``team.MEMBER``, are in any unit, and 0 where they aren't known.
    """
    num_threads = bounds.size - 1
    total = 0.0
    is_known = True
    for thread in range(num_threads):
        is_known &= members[thread].speed > 0
        total += members[thread].speed
    bounds[0] = 0.0
    for thread in range(num_threads):
        share = 1.0 / num_threads
        if is_known:
            share = _LEAST_SHARE * share + (1 - _LEAST_SHARE) * members[thread].speed / total
        bounds[thread + 1] = bounds[thread] + share
    bounds[num_threads] = 1.0


@inlined_jit
def record_speed(members, thread, bounds, ticks):
    """Note how long a thread's part of a step took. Others may read it behind the next barrier."""
    if ticks > 0:
        speed = (bounds[thread + 1] - bounds[thread]) / ticks
        known = members[thread].speed
        if known > 0:
            speed = known + _WEIGHT * (min(max(speed, known / _MOST_CHANGE), known * _MOST_CHANGE) - known)
        members[thread].speed = speed


@inlined_jit
def part_of(length, bounds, thread):
    """Return the half-open range of ``range(length)`` that is one thread's."""
    return int(length * bounds[thread] + 0.5), int(length * bounds[thread + 1] + 0.5)


@inlined_jit
def part_by_work(work, bounds, thread):
    """Return the same where pieces take different times: ``work[i]`` is what the first i pieces take."""
    last = work.size - 1
    start, stop = 0, 0
    while start < last and work[start] < bounds[thread] * work[last]:
        start += 1
    while stop < last and work[stop] < bounds[thread + 1] * work[last]:
        stop += 1
    return start, last if thread == bounds.size - 2 else stop
