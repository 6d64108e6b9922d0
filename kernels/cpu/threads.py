"""The threads that single ops share their work among: the caller, and others that have no work meanwhile.

A job is a function, called for each part of a range. Whoever has time claims the next part. The caller does
all parts that nobody else has begun, and waits only for those that somebody has. So beside busy neighbours,
where the others get no core, an op takes no longer than on one thread.

The others are the threads of torch's own OpenMP, which between ops of torch have the cores anyway, or workers
that sleep while there is no job. The caller waits for all of OpenMP's threads to leave, even for one that has
no part; where that takes long, as others have its core, the workers have the next jobs. They also have them
where there is no OpenMP, or torch's count of threads is not the one to use, and in a forked child.

One caller at a time has the others; another one meanwhile works alone. Workers are Python threads inside a
kernel that has released the GIL for good. The first job that is large enough asks for them, and the next op
starts them: a kernel can't.
"""

from __future__ import annotations

import ctypes
import os
import threading

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels import numba_private
from fastdl.kernels.cpu.atomics import add, compare_exchange, load, pause, sleep_while, wake
from fastdl.kernels.cpu.memory import aligned, array_at
from fastdl.kernels.cpu.openmp import parallel_region, region_address
from fastdl.kernels.jit import inlined_jit, jit, linked_jit
from fastdl.kernels.numba_private import cgutils

# 64-bit words between counters, so that none shares a cache line with another
_LINE = 8
# Which part is next: in 32 bits the number of the job, in 16 the part, in 16 the number of parts. It is one
# word, so that whoever claims a part has it of this job and no later one.
NEXT = 0
_PART, _PARTS = 1 << 32, 1 << 48
_MOST_PARTS = 1 << 14
# parts that are done; workers that sleep; whether the caller sleeps; whether the workers have a caller
DONE, SLEEPERS, IS_ASLEEP, IS_TAKEN = (position * _LINE for position in range(1, 5))
# the job: its function, the function's arguments, the length of the range, whether a part failed, and when
# the last one was done
_FUNCTION, _ARGUMENTS, _LENGTH, _HAS_FAILED, _END = (5 * _LINE + position for position in range(5))
# the number of workers, and how many the jobs so far could have used
WORKERS, WANTED = (6 * _LINE + position for position in range(2))
# the address of OpenMP's parallel region, or 0, and when its threads may be tried again
OPENMP, AVOIDED_UNTIL = (7 * _LINE + position for position in range(2))
_SIZE = 8 * _LINE
# How long a worker spins before it sleeps, in nanoseconds: the next op of a training step comes sooner, and
# waking takes as long as a small op. A worker whose looks at the clock are further apart than a glance while
# it spins has a core that others want.
_LONGEST_SPIN, _SHORTEST_SPIN, _GLANCE = 300_000, 20_000, 50_000
# how long the caller spins, while somebody else has a part
_CALLERS_SPIN = 100_000
# how long after the last part OpenMP's threads may leave, and how long they are avoided if one did later
_LONGEST_LEAVE, _AVOIDANCE = 300_000, 100_000_000

_counters = aligned(_SIZE, np.int64)
# an attribute of an array costs an op more than this
_words = _counters.data
# workers look at it to the very end of the process
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_counters))
_SYMBOL = "fastdl.threads"
numba_private.add_address(_SYMBOL, _counters.ctypes.data)
_openmp = region_address()
# how many workers have been started, or refused
_asked = 0
_starting = threading.Lock()


@intrinsic
def _counters_address(typing_context):
    """Return where this process has the counters; machine code on disk holds no address."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        memory = builder.module.globals.get(_SYMBOL) or ir.GlobalVariable(builder.module, word, _SYMBOL)
        return builder.ptrtoint(memory, word)

    return types.intp(), generate


def function_type(context):
    """Return the LLVM type of a job's function: of the arguments' address, start and stop of a part."""
    return context.call_conv.get_function_type(types.none, (types.intp,) * 3)


@intrinsic
def _call(typing_context, function, arguments, start, stop):
    """Call the function at an address, and return whether it failed."""

    def generate(context, builder, signature, values):
        kind = function_type(context)
        result, error = (cgutils.alloca_once(builder, argument.pointee) for argument in kind.args[:2])
        code = builder.call(builder.inttoptr(values[0], kind.as_pointer()), [result, error, *values[1:]])
        return builder.icmp_signed("!=", code, code.type(0))

    return types.boolean(*(types.intp,) * 4), generate


@inlined_jit
def _counters_array():
    return array_at(_counters_address(), _SIZE, np.dtype(np.int64))


@inlined_jit
def share(length, part, num_parts):
    """Return the half-open range of ``range(length)`` that is one of so many parts."""
    return length * part // num_parts, length * (part + 1) // num_parts


@inlined_jit
def _claim(counters):
    """Return a part of the job that nobody has begun, or -1, and the number of parts."""
    while True:
        word: int = load(counters, NEXT)
        part, num_parts = word >> 32 & 0xFFFF, word >> 48
        if part >= num_parts:
            return -1, num_parts
        if compare_exchange(counters, NEXT, word, word + _PART):
            return part, num_parts


@inlined_jit
def _run_part(counters, part, num_parts):
    start, stop = share(counters[_LENGTH], part, num_parts)
    if _call(counters[_FUNCTION], counters[_ARGUMENTS], start, stop):
        counters[_HAS_FAILED] = 1
    counters[_END] = pause()
    if add(counters, DONE, 1) == num_parts and load(counters, IS_ASLEEP) > 0:
        wake(counters, DONE, 1)


@jit
def serve(counters, index):
    """Run parts of jobs, as the worker of an index; return when there are to be no more workers than that."""
    spin = _LONGEST_SPIN
    since: int = pause()
    last = since
    while index < load(counters, WORKERS):
        word = load(counters, NEXT)
        part, num_parts = _claim(counters)
        now = pause()
        if part >= 0:
            _run_part(counters, part, num_parts)
            spin = min(spin + spin // 8, _LONGEST_SPIN)
            since = now = pause()
        elif now - last > _GLANCE:
            # others had the core: they may have it until there is work
            spin = _SHORTEST_SPIN
        if now - since > spin:
            add(counters, SLEEPERS, 1)
            sleep_while(counters, NEXT, word, 0)
            add(counters, SLEEPERS, -1)
            since = now = pause()
        last = now


@linked_jit
def _run_parts():
    """Run parts of the job that nobody has begun, until there are none."""
    counters = _counters_array()
    part, num_parts = _claim(counters)
    while part >= 0:
        _run_part(counters, part, num_parts)
        part, num_parts = _claim(counters)


_run_region = parallel_region(_run_parts)


@linked_jit
def run(function, arguments, length, num_threads):
    """Call a function for all parts of ``range(length)``, one for each thread, and return when all are done.

    Parameters
    ----------
    function : int
        Its address; it is of ``function_type``.
    arguments : int
        An address, which the function gets.
    length : int
    num_threads : int

    Raises
    ------
    MemoryError
        If a part failed, as nothing else can go wrong in one.
    """
    counters = _counters_array()
    num_threads = min(num_threads, _MOST_PARTS)
    region = counters[OPENMP]
    if region != 0 and pause() < counters[AVOIDED_UNTIL]:
        region = 0
    if region == 0:
        counters[WANTED] = max(counters[WANTED], num_threads - 1)
        num_threads = min(num_threads, counters[WORKERS] + 1)
    if num_threads <= 1 or not compare_exchange(counters, IS_TAKEN, 0, 1):
        if _call(function, arguments, 0, length):
            raise MemoryError("there is too little memory to compute with")
        return
    counters[_FUNCTION], counters[_ARGUMENTS], counters[_LENGTH] = function, arguments, length
    counters[_HAS_FAILED], counters[DONE] = 0, 0
    job = (counters[NEXT] + 1) % _PART
    add(counters, NEXT, num_threads * _PARTS + job - counters[NEXT])
    if region != 0:
        _run_region(region)
        left = pause()
        if left - counters[_END] > _LONGEST_LEAVE:
            counters[AVOIDED_UNTIL] = left + _AVOIDANCE
    else:
        num_missing = num_threads - 1 - (counters[WORKERS] - load(counters, SLEEPERS))
        if num_missing > 0:
            wake(counters, NEXT, num_missing)
        _run_parts()
    since = pause()
    done = load(counters, DONE)
    while done < num_threads:
        if pause() - since > _CALLERS_SPIN:
            add(counters, IS_ASLEEP, 1)
            sleep_while(counters, DONE, done, 0)
            add(counters, IS_ASLEEP, -1)
        done = load(counters, DONE)
    has_failed = counters[_HAS_FAILED] != 0
    add(counters, IS_TAKEN, -1)
    if has_failed:
        raise MemoryError("there is too little memory to compute with")


def usable(num_threads: int, num_cores: int) -> int:
    """Return how many threads an op may use, and have it find them.

    Parameters
    ----------
    num_threads : int
        Torch's count, and so that of OpenMP's threads.
    num_cores : int
        More threads than that wait for each other's cores.
    """
    _words[OPENMP] = _openmp if num_threads <= num_cores else 0
    num_threads = min(num_threads, num_cores)
    # never more than an op could use, whatever those that call kernels themselves ask for
    if _words[WANTED] > _asked < num_threads - 1:
        start_workers(min(_words[WANTED], num_threads - 1))
    return num_threads


def start_workers(count: int) -> None:
    """Have at least so many workers, or as many as the system has threads to give; it is asked once."""
    global _asked
    with _starting:
        first, _asked = _asked, max(_asked, count)
        if first == 0:
            # compiles it, not in a thread that the end of the process may find amidst
            serve(_counters, 0)
        for index in range(first, _asked):
            worker = threading.Thread(
                target=serve, args=(_counters, index), name=f"fastdl worker {index}", daemon=True
            )
            _words[WORKERS] = index + 1
            try:
                worker.start()
            except (RuntimeError, MemoryError):
                _words[WORKERS] = index
                return


def _after_fork() -> None:
    """Begin anew in a forked child, which has its parent's counters but no threads."""
    global _openmp, _asked, _starting
    _counters[:] = 0
    _openmp, _asked, _starting = 0, 0, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
