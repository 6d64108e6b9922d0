"""How the elementwise and row-wise kernels split their work among threads."""

from __future__ import annotations

from numba import prange

from fastdl.kernels.jit import inlined_jit, linked_jit

# below this many elements a thread's share takes less time than entering a parallel region (about 2 us)
MIN_ELEMENTS_PER_THREAD = 1 << 13


@inlined_jit
def worthwhile_threads(num_elements, num_threads):
    """Return how many of the threads have enough of the elements to pay for entering a parallel region."""
    return max(1, min(num_threads, num_elements // MIN_ELEMENTS_PER_THREAD))


@inlined_jit
def share(length, thread, num_threads):
    """Return the half-open range of ``range(length)`` that is one thread's."""
    return length * thread // num_threads, length * (thread + 1) // num_threads


def shared_out(part):
    """Make ``run(arguments, length, num_threads)`` of ``part(*arguments, start, stop)``, a thread's share.

    The arguments are arrays and numbers: Numba hands no record in a tuple over to its threads.
    """

    def run(arguments, length, num_threads):
        if num_threads == 1:
            part(*arguments, 0, length)
        else:
            for thread in prange(num_threads):
                start, stop = share(length, thread, num_threads)
                part(*arguments, start, stop)

    part = inlined_jit(part)
    run.__module__, run.__name__, run.__qualname__ = part.__module__, part.__name__, part.__qualname__
    return linked_jit(parallel=True)(run)
