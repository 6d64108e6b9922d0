"""A barrier for the threads of one training run: they wait for each other a few hundred thousand times.

Entering a parallel region of OpenMP costs about 2 us; this costs the trip of one cache line. A thread spins,
and where that takes long it sleeps until the last one wakes it, so that its core is free for others. Where it
waits for a thread that was last on its own core it sleeps at once: spinning would hold up whom it waits for.
The system may leave threads that wake each other on one core, so after some such waits a thread moves.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numba import types

from fastdl.kernels.cpu.atomics import add, load, pause, sleep_while, wake
from fastdl.kernels.jit import inlined_jit, linked_jit

# 64-bit words between the counters that threads write, so that none shares a cache line with another
LINE = 8
# a run's counters: arrivals at the barrier; threads that sleep there; whether to stop; steps that are done;
# each thread's arrivals
ARRIVALS, SLEEPERS, STOP, STEPS, OWN = (position * LINE for position in range(5))
# behind a thread's arrivals: its core, from 1, or 0 where none is known; how many waits in a row were for a
# thread on the same core; how often it has moved
_CORE, _MEETINGS, _MOVES = 1, 2, 3
# how long a thread waits before it looks where the others are, and before it sleeps, in nanoseconds
_GLANCE, _SPIN = 4_000, 100_000
# A thread that sleeps looks again after so many nanoseconds, as nobody wakes it when the run is to stop. When
# it sleeps again, Linux may give its core to whom it waits for, if that last ran more than 0.5 ms ago.
_LONGEST_SLEEP = 600_000
# A thread moves after so many waits in a row for one on its core, and after twice as many each time, up to
# 2 to the power of this: where there are more threads than cores it is of no use.
_FIRST_MEETINGS, _MOST_DOUBLINGS = 4, 8
_ALL_THREADS = (1 << 31) - 1
# words of a set of cores, as Linux has it
_CORE_WORDS = 16

if sys.platform == "linux":
    _current_core: Any = types.ExternalFunction("sched_getcpu", types.int32())
    _affinity: Any = types.int32(types.int32, types.intp, types.intp)
    _get_affinity: Any = types.ExternalFunction("sched_getaffinity", _affinity)
    _set_affinity: Any = types.ExternalFunction("sched_setaffinity", _affinity)
else:

    @inlined_jit
    def _current_core():
        return -1

    @inlined_jit
    def _get_affinity(thread, size, address):
        return -1

    _set_affinity = _get_affinity


@inlined_jit
def _leave(core):
    """Have the system move this thread from a core to another one that it may use, if there is any."""
    allowed = np.zeros(_CORE_WORDS, np.int64)
    if core >= 0 and _get_affinity(0, allowed.nbytes, allowed.ctypes.data) == 0:
        others = allowed.copy()
        others[core // 64] &= ~(1 << (core % 64))
        if _set_affinity(0, others.nbytes, others.ctypes.data) == 0:
            _set_affinity(0, allowed.nbytes, allowed.ctypes.data)


@inlined_jit
def _shares_core(counters, own, num_threads):
    """Return whether a thread is missing that was last on the core of the one whose counters begin at own."""
    for other in range(OWN, OWN + num_threads * LINE, LINE):
        core = counters[other + _CORE]
        if core > 0 and core == counters[own + _CORE] and load(counters, other) < counters[own]:
            return True
    return False


@inlined_jit
def _is_to_move(counters, own, meets):
    """Note whether a thread waits for one on its own core, and return whether it is to move to another."""
    counters[own + _MEETINGS] = counters[own + _MEETINGS] + 1 if meets else 0
    if counters[own + _MEETINGS] < _FIRST_MEETINGS << min(counters[own + _MOVES], _MOST_DOUBLINGS):
        return False
    counters[own + _MEETINGS] = 0
    counters[own + _MOVES] += 1
    return True


@linked_jit
def _wait_for_others(counters, own, num_threads):
    """Wait until all threads have arrived as often as the one whose counters begin at own, or for a stop."""
    goal = counters[own] * num_threads
    arrivals: int = load(counters, ARRIVALS)
    started = pause()
    has_looked = False
    while arrivals < goal and load(counters, STOP) == 0:
        waited = pause() - started
        if waited > _GLANCE:
            meets = _shares_core(counters, own, num_threads)
            if not has_looked and _is_to_move(counters, own, meets):
                _leave(counters[own + _CORE] - 1)
            elif meets or waited > _SPIN:
                add(counters, SLEEPERS, 1)
                sleep_while(counters, ARRIVALS, arrivals, _LONGEST_SLEEP)
                add(counters, SLEEPERS, -1)
            has_looked = True
            counters[own + _CORE] = _current_core() + 1
        arrivals = load(counters, ARRIVALS)


@inlined_jit
def wait(team, thread):
    """Return whether to go on: when all threads have called this for the same time, or the run is to stop.

    STOP is never taken back, and what a stopped run has computed counts for nothing. So threads need not
    agree on the step in which they see it: one that goes on sees it where it would wait for one that left.
    """
    counters, own = team.counters, OWN + thread * LINE
    counters[own] += 1
    counters[own + _CORE] = _current_core() + 1
    arrivals: int = add(counters, ARRIVALS, 1)
    if arrivals < counters[own] * team.members.size:
        _wait_for_others(counters, own, team.members.size)
    # of this and a sleeper's own addition and its look at the arrivals, one must see the other
    elif load(counters, SLEEPERS) > 0:
        wake(counters, ARRIVALS, _ALL_THREADS)
    return load(counters, STOP) == 0
